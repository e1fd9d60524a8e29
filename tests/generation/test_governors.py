"""Costs are measured once for each batch size and head, and heads take turns until one is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.core.module_pass import ModulePass
from sedac_hf.generation import governors as module
from sedac_hf.generation.costs import PassCosts
from sedac_hf.generation.governor import Governor
from sedac_hf.generation.governors import Governors, expected_costs
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import prompt
from tests.wrapping import wrap

VALUES: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of these tests follows the base's own modules."""
    monkeypatch.setenv("SEDAC_PASS", "modules")


class Clock:
    """Advances by what the last pass is said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_node: float) -> None:
        self.now = 0.0
        run = ModulePass.logits
        self.passes = 0

        def logits(run_pass: ModulePass, hidden: Tensor) -> Tensor:
            self.now += 1.0 + per_node * hidden.shape[1]
            self.passes += 1
            return run(run_pass, hidden)

        monkeypatch.setattr(ModulePass, "logits", logits)

    def __call__(self) -> float:
        return self.now


def governed(
    model: SedacForCausalLM, clock: Clock, monkeypatch: pytest.MonkeyPatch, rows: int = 1
) -> Governor:
    """The governor of a call of `generate`."""
    seen: list[Governor] = []
    find = Governors.find

    def noted(self: Any, run: Any, depth: Any, state: Any, head: Any) -> Governor:
        seen.append(find(self, run, depth, state, head, clock))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Governors, "find", noted)
        model.generate(prompt(rows, 5), **VALUES, sedac_mode="exact")
    return seen[0]


def test_costs_are_measured_at_first_use_only(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(llama, {-1: "feedback"})
    clock = Clock(monkeypatch, 0.01)
    first = governed(model, clock, monkeypatch)
    used = clock.passes
    assert governed(model, clock, monkeypatch) is first
    assert clock.passes - used <= VALUES["max_new_tokens"]
    assert governed(model, clock, monkeypatch, rows=2) is not first
    (one, two) = model.pass_choice().governors.to_dict()
    assert (one["batch"], two["batch"], one["head"]) == (1, 2, 0)
    assert {1, 2, 4, 8, 16} <= set(one["pass_ms"])
    assert one["pass_ms"] == one["tail_ms"]


def test_passes_that_will_not_pay_are_not_measured(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 3.0)
    taken: list[dict[int, float]] = []
    measure = module.measure_passes

    def noted(*args: Any, **values: Any) -> dict[int, float]:
        taken.append(measure(*args, **values))
        return taken[-1]

    monkeypatch.setattr(module, "measure_passes", noted)
    governed(wrap(llama, {-1: "feedback"}), clock, monkeypatch)
    assert taken == [{1: 4.0, 2: 7.0, 4: 13.0}]


def test_larger_batches_are_expected_to_take_what_as_many_nodes_did(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, measure, sizes = Clock(monkeypatch, 0.01), module.measure_passes, list[Any]()

    def noted(*args: Any, **values: Any) -> dict[int, float]:
        sizes.append((args[1].rows, args[2], values.get("sizes")))
        return measure(*args, **values)

    monkeypatch.setattr(module, "measure_passes", noted)
    model = wrap(llama, {1: "block"})
    for rows in (1, 4):
        governed(model, clock, monkeypatch, rows=rows)
    # All sizes once; of a head's tail one, beside the whole pass of that size.
    assert sizes == [(1, 0, None), (1, 2, (2,)), (1, 0, (2,)), (4, 2, (2,)), (4, 0, (2,))]
    one = PassCosts({1: 1.0, 4: 2.0, 16: 3.0})
    expected = expected_costs({1: one, 8: PassCosts({1: 9.0})}, 4)
    assert expected is not None
    assert expected.of_all((1, 2, 4)) == one.of_all((4, 8, 16))
    assert expected_costs({4: one}, 4) is None
    assert one.scaled(0.5).of_all((1, 2, 4)) == [0.5, pytest.approx(1.3333 / 2, 1e-3), 1.0]


def test_measuring_leaves_no_trace_in_the_text(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(llama, {1: "block"})
    clock = Clock(monkeypatch, 0.01)
    expected = llama.generate(prompt(2, 5), **VALUES)
    for _ in range(2):
        governed(model, clock, monkeypatch, rows=2)
        found = model.generate(prompt(2, 5), **VALUES, sedac_mode="exact")
        assert torch.equal(found, expected)


def test_every_head_is_tried_and_the_fastest_serves(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(llama, {0: "block", 2: "block"})
    clock = Clock(monkeypatch, 0.01)
    governors = model.pass_choice().governors
    served = []
    for _ in range(12):
        served.append(governors.pick_head(1, 2))
        governed(model, clock, monkeypatch)
    assert set(served) == {0, 1}
    known = governors.to_dict()
    best = max(known, key=lambda each: each["rate_drafting"])
    assert governors.pick_head(1, 2) == best["head"]
    assert governors.pick_head(1, 0) is None
