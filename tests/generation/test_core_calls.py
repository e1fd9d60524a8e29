"""How many cycles a call of the core runs: several, unless somebody waits for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sedac_hf.generation.core_cycles import CoreCycles
from sedac_hf.metrics import SEDACMetricsCollector
from sedac_hf.modeling import SedacForCausalLM
from tests.generation.drafting import padded
from tests.native import step_by_step
from tests.wrapping import wrap

GIVEN: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


class Columns(BaseStreamer):
    """Notes what it is given, and how many calls the core had had by then."""

    def __init__(self, calls: list[Any]) -> None:
        self.found: list[int] = []
        self._calls = calls

    def put(self, value: torch.Tensor) -> None:
        self.found.append(len(self._calls))

    def end(self) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Rows of each cycle of each call, from now on."""
    found: list[list[list[int]]] = []
    run = CoreCycles.run

    def counted(self: CoreCycles, *args: Any, **values: Any) -> Any:
        outcomes = run(self, *args, **values)
        found.append([outcome.rows for outcome in outcomes])
        return outcomes

    monkeypatch.setattr(CoreCycles, "run", counted)
    return found


@pytest.fixture
def model(llama: PreTrainedModel) -> SedacForCausalLM:
    return wrap(llama, {-1: "feedback", 1: "block"})


@pytest.mark.parametrize("mode", ["exact", "plain"])
def test_a_call_runs_several_cycles_where_nobody_waits(
    mode: str, model: SedacForCausalLM, calls: list[Any]
) -> None:
    given = {**padded(1), **GIVEN, "eos_token_id": None, "sedac_mode": mode}
    for _ in range(3):  # exact mode tries its head first, one cycle at a time
        calls.clear()
        text = model.generate(**given)
    cycles = sum(map(len, calls))
    assert len(calls) < cycles

    calls.clear()
    streamer = Columns(calls)
    assert torch.equal(model.generate(**given, streamer=streamer), text)
    assert {len(call) for call in calls} == {1}
    assert streamer.found[-1] == len(calls), "each token is told of when it is known"
    if mode == "plain":
        assert streamer.found == [0, *range(len(calls) + 1)]

    calls.clear()
    with SEDACMetricsCollector.for_model(model).attach(model):
        assert torch.equal(model.generate(**given), text)
    assert {len(call) for call in calls} == {1}


@pytest.mark.parametrize("mode", ["exact", "plain"])
def test_a_call_ends_with_the_end_of_a_row(
    mode: str, model: SedacForCausalLM, calls: list[Any]
) -> None:
    given = padded(4)
    whole = model.base_lm.generate(**given, **GIVEN, eos_token_id=None)
    new = whole[:, given["input_ids"].shape[1] :]
    values = {**given, **GIVEN, "eos_token_id": [int(new[1, 5]), int(new[2, 11])]}
    text = model.generate(**values, sedac_mode=mode)
    assert all(rows == call[0] for call in calls for rows in call)
    assert len({len(call[0]) for call in calls}) > 1, "rows have ended at different times"
    with step_by_step():
        assert torch.equal(model.generate(**values, sedac_mode=mode), text)
