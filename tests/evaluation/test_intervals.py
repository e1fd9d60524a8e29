from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sedac_hf.evaluation.intervals import bootstrap_median, bootstrap_ratio, ratio_standard_error


def test_a_mean_gets_the_interval_that_theory_gives():
    values = np.random.default_rng(0).normal(1.0, 0.5, 400)
    low, high = bootstrap_ratio(values, np.ones(400), resamples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.008)
    assert high == pytest.approx(values.mean() + half, abs=0.008)


def test_agrees_with_scipy_on_a_ratio():
    rng = np.random.default_rng(1)
    size = rng.integers(5, 100, 120).astype(float)
    total = size * rng.normal(0.01, 0.02, 120)
    low, high = bootstrap_ratio(total, size, resamples=5000)
    want = stats.bootstrap(
        (total, size),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = want.high - want.low
    assert low == pytest.approx(want.low, abs=0.06 * width)
    assert high == pytest.approx(want.high, abs=0.06 * width)


def test_pairs_stay_together():
    # Each unit's ratio is exactly 2, so the interval has no width; unpaired it would have one.
    bottom = np.random.default_rng(0).uniform(1, 100, 50)
    assert bootstrap_ratio(2 * bottom, bottom) == pytest.approx((2.0, 2.0))


def test_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for seed in range(200):
        values = rng.normal(0.3, 1.0, 80)
        low, high = bootstrap_ratio(values, np.ones(80), resamples=400, seed=seed)
        hits += low <= 0.3 <= high
    assert 176 <= hits <= 199


def test_an_infinite_value_shows():
    values = np.zeros(20)
    values[3] = np.inf
    assert bootstrap_ratio(values, np.ones(20))[1] == np.inf


def test_seed_decides():
    values, ones = np.random.default_rng(0).normal(size=30), np.ones(30)
    assert bootstrap_ratio(values, ones, seed=1) == bootstrap_ratio(values, ones, seed=1)
    assert bootstrap_ratio(values, ones, seed=1) != bootstrap_ratio(values, ones, seed=2)


def test_median_interval_contains_the_median():
    values = np.random.default_rng(0).normal(size=101)
    low, high = bootstrap_median(values)
    assert low < np.median(values) < high
    assert high - low < 0.7


def test_the_standard_error_of_a_ratio_is_its_spread_over_draws():
    rng = np.random.default_rng(4)
    found, errors = [], []
    for _ in range(2000):
        size = rng.integers(20, 100, 40).astype(float)
        total = size * rng.normal(0.2, 0.1, 40)
        found.append(total.sum() / size.sum())
        errors.append(ratio_standard_error(total, size))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.05)
    # with units of one size it is the standard error of a mean
    values = rng.normal(size=30)
    assert ratio_standard_error(values, np.ones(30)) == pytest.approx(stats.sem(values))
    assert ratio_standard_error(3 * size, size) == pytest.approx(0.0, abs=1e-12)
