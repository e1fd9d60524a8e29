"""Performance: what a latency is, and that a slow model fails. No claims on real time."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from sedac_hf.testing import PerformanceTest, SuiteInput, TestConfig
from sedac_hf.testing import performance as module
from sedac_hf.testing.performance import TokenClock, _Timed
from tests.evaluation.wrapped import random_documents, wrapped_llama

AMPLE, SLEEP = 60_000.0, 0.06


def performance(baseline, model, documents, **limits):
    few = {"max_new_tokens": 4, "rounds": 1, "prompts": 2} | limits
    return PerformanceTest().run(SuiteInput(baseline, model, documents, TestConfig(**few)))


@pytest.fixture
def tiny():
    return wrapped_llama()


def slow(base):
    """The base with a layer that sleeps."""
    layer = base.model.layers[0]
    layer.register_forward_hook(lambda *_: time.sleep(SLEEP))
    return base


def test_a_model_in_time_passes_and_all_figures_are_there(tiny):
    documents = random_documents(5)
    tiny.exit_stats.reset()
    found = performance(None, tiny, documents, latency_slo_ms=AMPLE, rounds=2)
    assert found.passed is True
    assert (found.prompts, found.rounds) == (2, 2)
    for one in (found.sedac, found.baseline):
        # three of the four tokens of 2 prompts x 2 rounds have one before them
        assert one.count == 12
        assert 0 < one.p50 <= one.p95 <= one.p99
        assert one.first_token > 0
    low, high = found.speed_interval
    assert 0 < low <= found.speed <= high
    assert found.exit_share > 0
    assert tiny.exit_stats.tokens == 0  # its own statistics are left alone


def test_a_limit_that_nothing_meets_fails(tiny):
    assert performance(None, tiny, random_documents(3), latency_slo_ms=1e-6).passed is False


@pytest.mark.parametrize("mode", ["certified", "exact", "plain"])
def test_a_model_that_really_sleeps_fails(tiny, mode):
    baseline = copy.deepcopy(tiny.base_lm)
    slow(tiny.base_lm)
    limits = {"mode": mode, "max_new_tokens": 3, "prompts": 1}
    found = performance(baseline, tiny, random_documents(3), latency_slo_ms=40.0, **limits)
    assert found.passed is False
    assert found.sedac.p99 >= 1e3 * SLEEP
    assert found.sedac.first_token >= 1e3 * SLEEP
    # nothing but the ratio is missed here
    limits |= {"latency_slo_ms": AMPLE, "min_speed_ratio": 1e-9}
    assert performance(baseline, tiny, random_documents(3), **limits).passed is True
    limits |= {"min_speed_ratio": 1e9}
    assert performance(baseline, tiny, random_documents(3), **limits).passed is False


def test_latencies_are_between_tokens_and_warm_up_is_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    paces = iter([9.0, 0.001, 0.002])  # seconds per token of each call; the first warms up

    def generate(input_ids, attention_mask, streamer):
        pace = next(paces)
        streamer.put(input_ids)
        now[0] += 50 * pace  # the prompt's pass
        for _ in range(51):
            streamer.put(torch.tensor([1]))
            now[0] += pace
        streamer.end()

    timed = _Timed(generate, {})
    for _ in range(3):
        timed(torch.ones(1, 7, dtype=torch.long))
    found = timed.latency(skip=1)
    assert found.count == 100
    assert found.p50 == pytest.approx(1.0)  # 50 of 100 latencies are 1 ms
    assert found.p95 == pytest.approx(2.0)
    assert found.mean == pytest.approx(1.5)
    assert found.first_token == pytest.approx(75.0)  # median of 50 and 100


def test_tokens_that_come_together_took_no_time_but_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    clock = TokenClock()
    for at, tokens in ((0.0, 5), (1.0, 1), (3.0, 3)):
        now[0] = at
        clock.put(torch.zeros(tokens))
    assert clock.times == [0.0, 1.0, 3.0, 3.0, 3.0]
