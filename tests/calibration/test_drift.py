"""Histograms of risks: what they hold, how they are kept, and what counts as drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.calibration import DriftMonitor, RiskHistograms
from sedac_hf.errors import CalibrationError, ConfigError


def risks(count, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    columns = [rng.gamma(2.0, 1.0, count) + shift, rng.exponential(0.5, count) + shift]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def histograms():
    return RiskHistograms.from_risks(risks(8000))


def test_bins_hold_equally_many_tokens(histograms):
    assert histograms.counts.shape == (2, 17)
    assert histograms.counts.sum(axis=1).tolist() == [8000, 8000]
    assert (np.abs(histograms.counts[:, :16] - 500) <= 1).all()
    assert (histograms.counts[:, 16] == 0).all()


def test_equal_and_broken_risks_are_counted_too():
    some = np.full((100, 1), 0.25, np.float32)
    some[:10] = np.nan
    found = RiskHistograms.from_risks(some)
    assert found.counts.sum() == 100
    assert found.counts[0, -1] == 10
    monitor = DriftMonitor(found, memory=256)
    monitor.observe(0, some[:, 0])
    assert monitor.drift(0) == 0.0
    with pytest.raises(CalibrationError, match="finite risk at every checkpoint"):
        RiskHistograms.from_risks(np.full((5, 2), np.nan, np.float32))


def test_tensors_bring_them_back(histograms):
    tensors = histograms.to_tensors()
    assert {name: t.dtype for name, t in tensors.items()} == {
        "risks.edges": torch.float32,
        "risks.counts": torch.int64,
    }
    again = RiskHistograms.from_tensors(tensors, 2)
    assert np.array_equal(again.edges, histograms.edges)
    assert np.array_equal(again.counts, histograms.counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("risks.edges"), "risk histograms are"),
        (lambda t: t.update({"risks.more": torch.zeros(1)}), "risk histograms are"),
        (lambda t: t.update({"risks.counts": t["risks.counts"].float()}), "int64"),
        (lambda t: t["risks.edges"].neg_(), "not decrease"),
        (lambda t: t["risks.counts"].neg_(), "at least 0"),
        (lambda t: t["risks.counts"][1].zero_(), "at every checkpoint"),
        (lambda t: t.update({"risks.counts": t["risks.counts"][:, 1:]}), "edges \\+ 2"),
        (lambda t: t.update({n: v[:1] for n, v in t.items()}), "1 checkpoints"),
    ],
)
def test_tensors_that_make_no_histograms_are_refused(histograms, change, message):
    tensors = histograms.to_tensors()
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        RiskHistograms.from_tensors(tensors, 2)


def test_there_is_no_opinion_without_tokens(histograms):
    monitor = DriftMonitor(histograms, memory=400)
    assert monitor.drift(0) is None
    monitor.observe(0, risks(99)[:, 0])
    assert monitor.drift(0) is None
    monitor.observe(0, risks(60, seed=1)[:, 0])
    assert monitor.drift(0) is not None
    assert monitor.drift(1) is None


def test_the_same_text_does_not_drift_and_another_does(histograms):
    """Over 200 samples of 300 tokens each: chance alone is taken off, a shift is not."""
    alike, shifted = [], []
    for seed in range(200):
        for shift, found in ((0.0, alike), (0.4, shifted)):
            monitor = DriftMonitor(histograms, memory=100_000, least=100)
            monitor.observe(1, risks(300, seed=seed + 1, shift=shift)[:, 1])
            found.append(monitor.drift(1))
    assert np.mean(alike) < 0.01
    assert np.max(alike) < 0.1 < np.min(shifted)


def test_broken_risks_are_drift(histograms):
    monitor = DriftMonitor(histograms, memory=1024)
    some = risks(600, seed=3)[:, 0]
    some[::10] = np.nan
    monitor.observe(0, some)
    assert monitor.drift(0) > 0.2


def test_what_is_past_is_forgotten(histograms):
    monitor = DriftMonitor(histograms, memory=200)
    for seed in range(10):
        monitor.observe(0, risks(100, seed=seed, shift=3.0)[:, 0])
    high = monitor.drift(0)
    after = []
    for seed in range(20):
        monitor.observe(0, risks(100, seed=100 + seed)[:, 0])
        after.append(monitor.drift(0))
    assert high > 1
    assert after[0] < high
    assert max(after[10:]) < 0.05


def test_tokens_that_stand_for_others_weigh_as_much(histograms):
    """Of a biased half only a quarter is seen, at a weight of four: no drift comes of it."""
    found = []
    for seed in range(60):
        monitor = DriftMonitor(histograms, memory=100_000, least=50)
        some = risks(2000, seed=seed + 1)[:, 0]
        low, rng = some < np.median(some), np.random.default_rng(seed)
        monitor.observe(0, some[~low])
        monitor.observe(0, some[low][rng.random(low.sum()) < 0.25], 4.0)
        assert monitor.tokens(0) < 2000
        found.append(monitor.drift(0))
    assert np.mean(found) < 0.01


def test_what_is_remembered_comes_back(histograms):
    monitor, other = (DriftMonitor(histograms, memory=200) for _ in range(2))
    monitor.observe(0, risks(150)[:, 0])
    other.restore(monitor.to_dict())
    assert other.drift(0) == monitor.drift(0)
    kept = monitor.to_dict()
    for wrong in (
        {**kept, "counts": [[1.0]]},
        {**kept, "squares": [-1.0, 0.0]},
        {**kept, "squares": [float("nan"), 0.0]},
    ):
        with pytest.raises(CalibrationError, match="counts of risks"):
            other.restore(wrong)
