from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sedac_hf import _core
from tests.rust import reference

UNIT = st.floats(0, 1)
INSIDE = st.floats(0.01, 0.99)
LEVELS = st.floats(0.001, 0.5)


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(0, 30), elements=UNIT), INSIDE, LEVELS)
def test_betting_equals_the_formula(x, alpha, delta):
    found = _core.betting_p_value(x, alpha, delta)
    assert found == pytest.approx(reference.betting_p_value(x, alpha, delta), rel=1e-9)
    assert 0 <= found <= 1


@settings(deadline=None)
@given(st.integers(1, 3000), UNIT, INSIDE)
def test_hoeffding_bentkus_equals_the_formula(n, mean, alpha):
    found = _core.hoeffding_bentkus_p_value(n, mean, alpha)
    expected = reference.hoeffding_bentkus_p_value(n, mean, alpha)
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-300)
    assert 0 <= found <= 1


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
def test_zero_risk(n):
    alpha = 0.05
    # Both bounds are (1 - alpha)^n here; Bentkus carries a factor e.
    expected = math.exp(n * math.log1p(-alpha))
    assert _core.hoeffding_bentkus_p_value(n, 0.0, alpha) == pytest.approx(expected, rel=1e-9)
    assert reference.hoeffding_bentkus_p_value(n, 0.0, alpha) == pytest.approx(expected, rel=1e-9)
    betting = _core.betting_p_value(np.zeros(n), alpha, 0.1)
    assert 0 <= betting < 1
    assert n < 1000 or betting < 1e-3


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_no_observations_prove_nothing(alpha):
    assert _core.betting_p_value(np.zeros(0), alpha, 0.1) == 1
    assert _core.hoeffding_bentkus_p_value(0, 0.0, alpha) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("value", [0.0, 0.02, 0.5, 1.0])
def test_extremes_stay_in_range(value, alpha):
    for n in (1, 7, 500):
        betting = _core.betting_p_value(np.full(n, value), alpha, 0.1)
        bentkus = _core.hoeffding_bentkus_p_value(n, value, alpha)
        assert 0 <= betting <= 1
        assert 0 <= bentkus <= 1
        if value >= alpha:
            assert betting == 1
            assert bentkus == 1


def draws(kind: str, alpha: float, shape: tuple[int, int]) -> np.ndarray:
    """Observations whose mean is exactly `alpha`: the hardest case of the hypothesis."""
    rng = np.random.default_rng(20)
    if kind == "coin":
        return (rng.random(shape) < alpha).astype(np.float64)
    if kind == "beta":
        return rng.beta(4 * alpha, 4 * (1 - alpha), shape)
    if kind == "rare":
        # Mostly just below the bar, seldom far above: what an average easily misses.
        low, share = 0.9 * alpha, 0.02
        high = min(1.0, low + (alpha - low) / share)
        share = (alpha - low) / (high - low)
        return np.where(rng.random(shape) < share, high, low)
    return np.full(shape, alpha) + rng.uniform(-0.02, 0.02, shape)


@pytest.mark.parametrize("kind", ["coin", "beta", "rare", "narrow"])
@pytest.mark.parametrize("alpha", [0.1, 0.52])
def test_p_values_are_valid(kind, alpha):
    repeats, n = 4000, 80
    x = draws(kind, alpha, (repeats, n))
    betting = np.array([_core.betting_p_value(row, alpha, 0.1) for row in x])
    bentkus = np.array([_core.hoeffding_bentkus_p_value(n, m, alpha) for m in x.mean(axis=1)])
    for level in (0.01, 0.05, 0.1, 0.2, 0.5):
        slack = 4 * math.sqrt(level * (1 - level) / repeats)
        assert (betting <= level).mean() <= level + slack
        assert (bentkus <= level).mean() <= level + slack


def test_betting_needs_fewer_observations_than_hoeffding_bentkus():
    # A mean loss of 0.003 nats, spread 0.01, clipped at 0.1, against a bar of 1 %.
    clip, bar = 0.1, math.log(1.01)
    loss = np.random.default_rng(0).normal(0.003, 0.01, 256).clip(-clip, clip)
    x, alpha = (loss + clip) / (2 * clip), (bar + clip) / (2 * clip)
    assert _core.betting_p_value(x, alpha, 0.1) < 0.05
    assert _core.hoeffding_bentkus_p_value(len(x), x.mean(), alpha) > 0.1


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(0, 12), elements=UNIT | st.just(math.nan)), LEVELS)
def test_fixed_sequence_counts_until_the_first_failure(p_values, delta):
    count = 0
    for p in p_values:
        if not p <= delta:
            break
        count += 1
    assert _core.fixed_sequence(p_values, delta) == count


def test_fixed_sequence_by_example():
    assert _core.fixed_sequence(np.array([0.01, 0.1, 0.11, 0.0]), 0.1) == 2
    assert _core.fixed_sequence(np.array([0.2, 0.0, 0.0]), 0.1) == 0
    assert _core.fixed_sequence(np.zeros(3), 0.1) == 3
    assert _core.fixed_sequence(np.zeros(0), 0.1) == 0


def test_values_out_of_range_are_named():
    half = np.array([0.5, 1.5])
    with pytest.raises(ValueError, match=r"x\[1\] must be in \[0, 1\], found 1.5"):
        _core.betting_p_value(half, 0.5, 0.1)
    with pytest.raises(ValueError, match=r"x\[0\] must be in \[0, 1\], found NaN"):
        _core.betting_p_value(np.array([math.nan]), 0.5, 0.1)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        _core.betting_p_value(half[:1], 1.5, 0.1)
    with pytest.raises(ValueError, match="delta must be between 0 and 1, found 0"):
        _core.betting_p_value(half[:1], 0.5, 0.0)
    with pytest.raises(ValueError, match="mean must be in"):
        _core.hoeffding_bentkus_p_value(3, -0.1, 0.5)
    with pytest.raises(OverflowError):
        _core.hoeffding_bentkus_p_value(-3, 0.1, 0.5)
    with pytest.raises(ValueError, match="delta must be between 0 and 1, found 1"):
        _core.fixed_sequence(half, 1.0)
