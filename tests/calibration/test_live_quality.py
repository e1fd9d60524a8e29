"""The rise of perplexity from a share of the exits is that of all of them, on average."""

from __future__ import annotations

import numpy as np
import pytest

from sedac_hf.calibration.live_quality import QualityMonitor
from sedac_hf.calibration.throughput import ThroughputMonitor
from sedac_hf.errors import CalibrationError

AGREE = np.ones(1, np.bool_)


def monitor(limit=0.01, memory=10**9):
    return QualityMonitor(2, limit, memory=memory)


def test_nothing_is_known_at_first():
    fresh = monitor()
    assert fresh.rise is None
    assert not fresh.is_broken
    assert not fresh.is_sound
    fresh.passed(100)
    assert (fresh.rise, fresh.is_sound, fresh.agreement()) == (0.0, True, [None, None])


def test_a_sample_tells_what_all_would():
    rng = np.random.default_rng(1)
    truth, found, errors = 0.0, [], []
    divergence, leaves = rng.exponential(0.2, 4000), rng.random(4000) < 0.3
    truth = (divergence * leaves).sum() / 4000
    for seed in range(200):
        picks = leaves & (np.random.default_rng(seed).random(4000) < 0.25)
        each = monitor()
        each.passed(4000)
        each.judged(1, divergence[picks], np.ones(picks.sum(), np.bool_), 0.25)
        found.append(each.rise)
        errors.append(each.error)
    assert np.mean(found) == pytest.approx(truth, rel=0.02)
    # The error covers both draws: of tokens and of what is looked at.
    assert np.std(found) <= np.mean(errors) < 2 * np.std(found)


def test_checkpoints_add_up():
    each = monitor()
    each.passed(100)
    each.judged(0, np.array([0.5]), AGREE, 1.0)
    each.judged(1, np.array([0.5, 1.0]), np.array([True, False]), 1.0)
    assert each.rise == pytest.approx(0.02)
    assert each.agreement() == [1.0, 0.5]


def test_a_bound_is_broken_beyond_chance_only():
    few, many = monitor(), monitor()
    for each, exits in ((few, 4), (many, 200)):
        each.passed(50 * exits)
        each.judged(0, np.full(exits, 1.0), np.ones(exits, np.bool_), 1.0)
        assert each.rise == pytest.approx(0.02)
        assert not each.is_sound
    assert not few.is_broken
    assert many.is_broken


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_divergence_that_is_none_counts_as_large(value):
    each = monitor()
    each.passed(1000)
    each.judged(0, np.full(20, value), np.zeros(20, np.bool_), 0.5)
    assert each.rise == pytest.approx(20 * 20 / 0.5 / 1000)
    assert each.is_broken


def test_what_is_past_is_forgotten():
    each = monitor(memory=100)
    each.passed(100)
    each.judged(0, np.full(30, 2.0), np.zeros(30, np.bool_), 1.0)
    assert each.is_broken
    for _ in range(40):
        each.passed(25)
    assert each.is_sound
    assert each.rise < 1e-4


def test_one_checkpoint_can_go_on_alone():
    each = monitor(memory=100)
    each.passed(100)
    each.judged(1, np.full(10, 1.0), np.ones(10, np.bool_), 1.0)
    for _ in range(20):
        each.passed(50, 1)
    assert each.rise == pytest.approx(0.0, abs=1e-4)
    assert each.to_dict()["tokens"][0] == 100


def test_what_is_remembered_comes_back():
    each, other = monitor(), monitor()
    each.passed(1000)
    each.judged(0, np.full(10, 0.3), np.ones(10, np.bool_), 0.25)
    other.restore(each.to_dict())
    assert (other.rise, other.error) == (each.rise, each.error)
    for wrong in ({"rise": [np.nan, 0.0]}, {"tokens": [-1.0, 0.0]}, {"squares": [0.0]}):
        with pytest.raises(CalibrationError, match="quality"):
            other.restore({**each.to_dict(), **wrong})


def test_throughput_is_that_of_the_clock():
    each = ThroughputMonitor(10**9)
    assert each.ratio is None
    each.add((2.0, 20), (2.0, 20))
    assert each.ratio == pytest.approx(1.0)
    each.add((0.0, 0), (1.0, 40))
    assert each.ratio == pytest.approx(0.1 / (3.0 / 60))
    other = ThroughputMonitor(10**9)
    other.restore(each.to_dict())
    assert other.ratio == each.ratio
    with pytest.raises(CalibrationError, match="times of steps"):
        other.restore({"sums": [[1.0, -1.0], [1.0, 1.0]]})
