from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sedac_hf.errors import CalibrationError, ModeError
from sedac_hf.evaluation import benchmark as module
from sedac_hf.evaluation.benchmark import benchmark
from tests.evaluation.wrapped import wrapped_llama

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
# Seconds that the invented clock gives to each arm.
PACE = {"generate": 0.6, "plain": 0.3, "sedac": 0.2}


@pytest.fixture(scope="module")
def model():
    return wrapped_llama()


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock: every call still generates, but takes the time of its arm."""
    calls = []
    arms = module._arms

    def named(*args):
        return {name: (name, call) for name, call in arms(*args).items()}

    def timed(arm, ids):
        name, call = arm
        out = call(ids)
        calls.append((name, ids.tolist()[0], out.shape[1] - ids.shape[1]))
        # The machine gets slower and slower; paired ratios must not care.
        return PACE[name] * (1 + (len(calls) - 1) // 3)

    monkeypatch.setattr(module, "_arms", named)
    monkeypatch.setattr(module, "timed_call", timed)
    return calls


def test_ratios_are_of_paired_times_and_a_slowing_machine_cancels(model, clock):
    found = benchmark(model, PROMPTS, max_new_tokens=4, rounds=3)
    assert found.mode == "certified"
    assert found.ratios["generate"].median == pytest.approx(3.0)
    assert found.ratios["plain"].median == pytest.approx(1.5)
    assert found.ratios["generate"].interval == pytest.approx((3.0, 3.0))
    assert np.shape(found.seconds["sedac"]) == (3, 3)
    # Round -1, whose times begin at the first call, is not kept.
    assert min(map(min, found.seconds["sedac"])) == pytest.approx(0.2 * 4)
    assert found.prompt_lengths == [3, 2, 4]


def test_arms_take_turns_and_write_the_same_number_of_tokens(model, clock):
    benchmark(model, PROMPTS, max_new_tokens=4, rounds=3)
    assert len(clock) == 4 * 3 * 3
    assert {tokens for *_, tokens in clock} == {4}
    first = []
    for at in range(0, len(clock), 3):
        turn = clock[at : at + 3]
        assert {name for name, *_ in turn} == set(PACE)
        assert len({tuple(prompt) for _, prompt, _ in turn}) == 1
        first.append(turn[0][0])
    assert {name: first.count(name) for name in PACE} == dict.fromkeys(PACE, 4)


def test_exits_are_counted_apart_from_the_models_own(model):
    model.exit_stats.reset()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3)
    before = model.exit_stats.to_dict()
    found = benchmark(model, PROMPTS, max_new_tokens=6, rounds=2)
    assert model.exit_stats.to_dict() == before
    assert found.exits["tokens"] == 6 * 2 * 3
    assert sum(found.exits["exits_by_layer"].values()) > 0


def test_real_times_are_positive_and_in_an_interval(model):
    found = benchmark(model, PROMPTS, max_new_tokens=2, rounds=2)
    for name in PACE:
        assert found.tokens_per_second[name] > 0
    for ratio in found.ratios.values():
        low, high = ratio.interval
        assert 0 < low <= ratio.median <= high
    assert found.to_dict()["ratios"]["plain"]["median"] == found.ratios["plain"].median


def test_many_prompts_are_thinned_evenly(model, clock):
    prompts = [[3 + i] for i in range(20)]
    benchmark(model, prompts, max_new_tokens=1, rounds=1, max_prompts=3)
    assert {prompt[0] for _, prompt, _ in clock} == {3, 12, 22}


def test_the_mode_is_the_models_own_unless_named(model, clock):
    assert benchmark(model, PROMPTS, mode="off", max_new_tokens=1, rounds=1).mode == "off"
    assert benchmark(model, PROMPTS, mode="plain", max_new_tokens=1, rounds=1).mode == "plain"


def test_a_limit_ends_the_first_round_between_inputs(model, monkeypatch):
    now = iter([0.0, 3.0, 6.0])  # at the start, before the second input, before the third
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=now.__next__))
    monkeypatch.setattr(module, "timed_call", lambda arm, ids: arm(ids))
    inputs = [torch.tensor([[i]]) for i in (5, 6, 7, 8)]
    arms = {"a": lambda ids: float(ids), "b": lambda ids: 2.0 * float(ids)}
    found = module.take_turns(model, arms, inputs, rounds=2, warm_up=1, limit=5.0)
    assert found["a"].tolist() == [[5.0, 6.0], [5.0, 6.0]]
    assert found["b"].tolist() == [[10.0, 12.0], [10.0, 12.0]]


def test_bad_arguments_are_refused(model):
    with pytest.raises(CalibrationError, match="no prompts"):
        benchmark(model, [])
    with pytest.raises(CalibrationError, match="no tokenizer"):
        benchmark(model, ["text"])
    with pytest.raises(CalibrationError, match="has no tokens"):
        benchmark(model, [[]])
    with pytest.raises(CalibrationError, match="at least 1"):
        benchmark(model, PROMPTS, rounds=0)
    with pytest.raises(ModeError, match="sedac_mode"):
        benchmark(model, PROMPTS, mode="fast", max_new_tokens=1)
