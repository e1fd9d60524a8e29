from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sedac_hf import _core
from sedac_hf.calibration.bounds import RiskTarget, binomial_upper_bound, documents_needed
from sedac_hf.errors import CalibrationError
from tests.calibration import oracle

TARGET = RiskTarget()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=60))
def test_p_values_are_those_of_the_plain_formulas(deltas):
    values = np.array(deltas)
    found = TARGET.test(values)
    unit = (np.clip(values, -0.1, 0.1) + 0.1) / 0.2
    level = (math.log(1.01) + 0.1) / 0.2
    assert found.p_betting == pytest.approx(oracle.betting_p_value(unit, level, 0.1), rel=1e-9)
    assert found.p_hoeffding_bentkus == pytest.approx(
        oracle.hoeffding_bentkus_p_value(len(values), unit.mean(), level), rel=1e-6
    )
    beyond = int((values > 0.1).sum())
    assert found.beyond_clip == beyond
    exact = sum(
        math.comb(len(values), i) * 0.05**i * 0.95 ** (len(values) - i) for i in range(beyond + 1)
    )
    assert found.p_tail == pytest.approx(exact, rel=1e-9)
    assert found.p_value == max(found.p_betting, found.p_tail)


@pytest.mark.parametrize(
    "shape",
    [
        # All on the boundary: their mean is the level itself, which is the hardest true hypothesis.
        lambda rng, n: np.where(rng.random(n) < 0.0499, 0.1, 0.0048),
        lambda rng, n: np.where(rng.random(n) < 0.5, 0.1, -0.08),
        lambda rng, n: stats.norm.rvs(math.log(1.01), 0.02, n, random_state=rng),
    ],
    ids=["rare large losses", "two values", "narrow"],
)
def test_a_policy_on_the_boundary_is_accepted_at_most_in_a_delta_share(shape):
    rng, repeats, n = np.random.default_rng(7), 1500, 150
    truth = np.clip(shape(rng, 2_000_000), -0.1, 0.1).mean()
    # Shift the claim rather than the data, so that the mean is exactly at it.
    target = RiskTarget(epsilon=math.expm1(truth))
    accepted = sum(target.test(shape(rng, n)).p_betting <= target.delta for _ in range(repeats))
    assert accepted <= stats.binom.ppf(0.999, repeats, target.delta)


def test_the_betting_test_needs_far_fewer_documents_than_hoeffding_bentkus():
    deltas = np.random.default_rng(0).normal(0.003, 0.01, 160)
    found = TARGET.test(deltas)
    assert found.p_betting <= TARGET.delta
    assert found.p_hoeffding_bentkus > 0.5


def test_a_heavy_tail_is_refused_although_its_clipped_mean_is_low():
    deltas = np.full(400, -0.02)
    deltas[:32] = 3.0
    found = TARGET.test(deltas)
    assert found.p_betting <= TARGET.delta
    assert found.mean > TARGET.limit
    assert found.p_value > TARGET.delta


def test_an_infinite_loss_counts_as_beyond_the_clip():
    deltas = np.zeros(200)
    deltas[5] = np.inf
    found = TARGET.test(deltas)
    assert found.beyond_clip == 1
    assert found.mean == math.inf
    assert found.clipped_mean == pytest.approx(0.1 / 200)


def test_nan_and_nothing_are_refused():
    with pytest.raises(CalibrationError, match="1 of 2 documents have a NaN"):
        TARGET.test(np.array([0.0, np.nan]))
    with pytest.raises(CalibrationError, match="no documents"):
        TARGET.test(np.array([]))


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"clip": math.inf},
        {"tail_share": 0.0},
        {"epsilon": 0.2, "clip": 0.1},
    ],
)
def test_targets_out_of_range_are_refused(bad):
    with pytest.raises(CalibrationError):
        RiskTarget(**bad)


@pytest.mark.parametrize(("seen", "trials"), [(0, 50), (3, 120), (7, 7)])
def test_binomial_upper_bound_is_where_the_tail_has_delta_left(seen, trials):
    bound = binomial_upper_bound(seen, trials, 0.1)
    if seen == trials:
        assert bound == 1.0
    else:
        assert stats.binom.cdf(seen, trials, bound) == pytest.approx(0.1)


def test_documents_needed_is_about_where_the_test_begins_to_pass():
    rng = np.random.default_rng(1)
    deltas = rng.normal(0.006, 0.02, 60)
    deltas += 0.006 - deltas.mean()
    assert TARGET.test(deltas).p_value > TARGET.delta
    needed = documents_needed(deltas, TARGET)
    assert needed is not None
    assert needed > 60

    def share(size):
        draws = [rng.choice(deltas, size) for _ in range(200)]
        return np.mean([TARGET.test(d).p_value <= TARGET.delta for d in draws])

    assert share(needed // 2) < 0.5
    assert share(needed * 2) > 0.5


def test_no_number_of_documents_helps_a_policy_that_is_too_bold():
    rng = np.random.default_rng(2)
    assert documents_needed(rng.normal(0.02, 0.01, 60), TARGET) is None
    tailed = np.where(np.arange(100) < 10, 1.0, -0.05)
    assert documents_needed(tailed, TARGET) is None


def test_fixed_sequence_stops_at_the_first_failure():
    for p_values in ([], [0.5], [0.01, 0.02, 0.3, 0.01], [0.1, 0.1], [math.nan, 0.0]):
        found = _core.fixed_sequence(np.array(p_values, dtype=np.float64), 0.1)
        assert found == oracle.fixed_sequence(p_values, 0.1)
