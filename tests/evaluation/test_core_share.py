"""What a step spends outside the core: clocks, modes, and passes that are not the core's."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sedac_hf.core.native_pass import NativePass
from sedac_hf.evaluation.core_share import measure_core_share
from sedac_hf.modeling import SedacForCausalLM
from tests.generation.test_settled import settled

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def model() -> SedacForCausalLM:
    return settled("feedback")


def test_every_mode_has_a_share_of_its_steps(model: SedacForCausalLM) -> None:
    shares = measure_core_share(model, PROMPT, tokens=24)
    found = {(each.mode, each.streamed): each for each in shares}
    ways = (True, False)
    assert set(found) == {(m, way) for m in ("plain", "exact", "certified") for way in ways}
    assert found["plain", True].steps == 24 - 1 - 8
    assert found["plain", False].steps == 24 - 8
    for each in found.values():
        # A difference of whole calls may be lost in what else the machine does.
        assert each.outside_ms > 0 or not each.streamed
        assert each.outside_ms < each.step_ms
        assert each.outside == each.outside_ms / each.step_ms


def test_what_the_interpreter_does_counts_as_outside(
    model: SedacForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = NativePass.look_again

    def slow(self: NativePass, **values: Any) -> Any:
        time.sleep(0.01)
        return look(self, **values)

    monkeypatch.setattr(NativePass, "look_again", slow)
    streamed, whole = measure_core_share(model, PROMPT, ("plain",), tokens=32)
    assert streamed.outside_ms > 10
    assert streamed.step_ms > streamed.outside_ms
    assert 1 < whole.outside_ms < streamed.outside_ms, "one call of the core runs several steps"


def test_what_does_not_run_on_the_native_pass_is_left_out(
    model: SedacForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.exit_stats.to_dict()
    with model.native_disabled():
        assert measure_core_share(model, PROMPT, tokens=12) == []
    monkeypatch.setitem(model.refused_modes, "exact", "no")
    assert measure_core_share(model, PROMPT, ("exact", "off"), tokens=12) == []
    assert model.exit_stats.to_dict() == before
