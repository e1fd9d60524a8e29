"""A looser threshold has to earn it, a tighter one never has to, and nothing unknown loosens."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.calibration import DualMetricCalibration
from sedac_hf.errors import CalibrationError, ConfigError

GOOD = {"ppl_increase": 0.004, "throughput": 1.3, "drift": 0.02}
NAN, INF = math.nan, math.inf
ANY = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))


def fresh(**values) -> DualMetricCalibration:
    values = {"thresholds": {7: 1.0}, "bounds": {7: (0.1, 2.0)}, "smoothing": 0.5, **values}
    return DualMetricCalibration(**values)


def test_defaults_are_those_of_the_first_description():
    calibration = DualMetricCalibration()
    found = (
        calibration.ppl_tolerance,
        calibration.throughput_target,
        calibration.drift_threshold,
    )
    assert found == (0.01, 1.1, 0.1)
    update = DualMetricCalibration(
        ppl_tolerance=0.01, throughput_target=1.1, drift_threshold=0.1
    ).update_threshold(7, 0.5, {"ppl_increase": 0.005, "throughput": 1.2})
    assert (update.accepted, update.threshold, update.previous) == (True, 0.5, 0.0)


def test_a_looser_threshold_goes_a_share_of_the_way():
    calibration = fresh()
    update = calibration.update_threshold(7, 1.6, GOOD)
    assert (update.accepted, update.reason) == (True, "accepted")
    assert update.threshold == pytest.approx(1.3)
    assert calibration.thresholds == {7: update.threshold}
    assert calibration.update_threshold(7, 1.6, GOOD).threshold == pytest.approx(1.45)


def test_bounds_come_before_smoothing():
    update = fresh().update_threshold(7, 100.0, GOOD)
    assert (update.reason, update.threshold) == ("bounded", pytest.approx(1.5))
    assert "[0.1, 2]" in update.detail
    low = fresh().update_threshold(7, 0.0, GOOD)
    assert (low.reason, low.threshold) == ("bounded", pytest.approx(0.55))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ppl_increase": 0.011}, "quality"),
        ({"ppl_increase": NAN}, "quality"),
        ({"ppl_increase": -INF}, "quality"),
        ({"ppl_increase": None}, "quality"),
        ({"throughput": 1.09}, "throughput"),
        ({"throughput": NAN}, "throughput"),
        ({"throughput": INF}, "throughput"),
        ({"throughput": None}, "throughput"),
        ({"drift": 0.11}, "drift"),
        ({"drift": NAN}, "drift"),
        ({"drift": None}, "drift"),
        # The checks come in order: the first that fails is the one that is named.
        ({"ppl_increase": 0.5, "throughput": 0.5}, "quality"),
    ],
)
def test_what_loosens_is_refused_for_a_reason(changes, reason):
    calibration = fresh()
    update = calibration.update_threshold(7, 1.5, {**GOOD, **changes})
    assert (update.accepted, update.threshold, update.reason) == (False, 1.0, reason)
    assert str(next(iter(changes.values()))) in update.detail or reason != "quality"
    assert calibration.thresholds == {7: 1.0}
    assert calibration.outcomes == {reason: 1}
    # Whatever is wrong, the safe direction is open.
    assert calibration.update_threshold(7, 0.5, {**GOOD, **changes}).threshold == 0.75


@pytest.mark.parametrize("wanted", [NAN, INF, -INF, -0.5])
def test_a_threshold_that_is_none_is_refused(wanted):
    update = fresh().update_threshold(7, wanted, GOOD)
    assert (update.accepted, update.threshold, update.reason) == (False, 1.0, "threshold")


def test_missing_metrics_loosen_nothing():
    assert fresh().update_threshold(7, 1.5, {}).reason == "quality"
    assert fresh().update_threshold(7, 1.5, {"ppl_increase": 0.0}).reason == "throughput"


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(
            ANY.filter(lambda x: x is not None),
            st.fixed_dictionaries({"ppl_increase": ANY, "throughput": ANY, "drift": ANY}),
        ),
        max_size=20,
    )
)
def test_no_sequence_of_updates_loosens_without_sound_metrics(steps):
    calibration = fresh()
    for wanted, metrics in steps:
        before = calibration.thresholds[7]
        update = calibration.update_threshold(7, wanted, metrics)
        after = calibration.thresholds[7]
        assert update.threshold == after
        assert 0.1 <= after <= 2.0
        if after > before:
            assert metrics["ppl_increase"] <= 0.01
            assert 1.1 <= metrics["throughput"] < INF
            assert metrics["drift"] <= 0.1
        if not update.accepted:
            assert after == before
            assert update.detail


def test_by_default_nothing_becomes_looser_than_it_began():
    calibration = DualMetricCalibration(thresholds={3: 0.4}, smoothing=1.0)
    assert calibration.update_threshold(3, 0.9, GOOD).threshold == 0.4
    assert calibration.update_threshold(3, 0.1, GOOD).threshold == 0.1
    assert calibration.update_threshold(3, 0.9, GOOD).threshold == 0.4


@pytest.mark.parametrize(
    "values",
    [
        {"ppl_tolerance": 0.0},
        {"ppl_tolerance": NAN},
        {"throughput_target": -1},
        {"drift_threshold": INF},
        {"smoothing": 0.0},
        {"smoothing": 1.1},
        {"thresholds": {7: NAN}},
        {"thresholds": {7: 3.0}},
        {"bounds": {7: (1.5, 2.0)}},
    ],
)
def test_values_out_of_range_are_refused_at_construction(values):
    with pytest.raises(ConfigError, match="found"):
        fresh(**values)


def test_thresholds_come_back():
    calibration, other = fresh(), fresh()
    calibration.update_threshold(7, 1.9, GOOD)
    calibration.update_threshold(7, 1.9, {})
    other.restore(calibration.to_dict())
    assert other.to_dict() == calibration.to_dict()
    for wrong, message in (
        ({"8": 1.0}, "layers"),
        ({"7": 9.0}, "outside"),
        ({"7": NAN}, "outside"),
    ):
        with pytest.raises(CalibrationError, match=message):
            other.restore({**calibration.to_dict(), "thresholds": wrong})
    assert other.to_dict() == calibration.to_dict()


def test_updates_from_several_threads_are_all_counted():
    calibration = fresh()
    work = [
        threading.Thread(
            target=lambda: [calibration.update_threshold(7, 0.5, GOOD) for _ in range(200)]
        )
        for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert calibration.outcomes == {"accepted": 800}
