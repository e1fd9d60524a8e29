"""Safe at once, back only after long, and never to and fro."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedac_hf.calibration.protection import Protection, Signals
from sedac_hf.errors import CalibrationError

WELL = Signals(drift=0.01, measures_drift=True, broken=False, sound=True)
DRIFT = replace(WELL, drift=0.2)
BROKEN = replace(WELL, broken=True, sound=False)


def fresh(has_rung: bool = True) -> Protection:
    return Protection(0.1, has_rung=has_rung, recovery=0.5, patience=100)


@pytest.mark.parametrize(
    ("signals", "has_rung", "level", "reason"),
    [
        (DRIFT, True, "rung", "drift"),
        (DRIFT, False, "off", "drift"),
        (BROKEN, True, "off", "quality"),
        (replace(BROKEN, drift=0.2), True, "off", "quality"),
        (replace(WELL, drift=float("nan")), True, "rung", "drift"),
    ],
)
def test_it_falls_back_at_once(signals, has_rung, level, reason):
    protection = fresh(has_rung)
    assert protection.judge(10, WELL) is None
    assert protection.judge(10, signals) == "fallback"
    assert (protection.level, protection.reason) == (level, reason)
    assert protection.fallbacks == 1


def test_what_is_not_known_yet_is_no_reason():
    protection = fresh()
    assert protection.judge(1000, replace(WELL, drift=None, sound=False)) is None
    assert protection.level == "certified"


def test_a_broken_bound_turns_the_rung_off_too():
    protection = fresh()
    protection.judge(10, DRIFT)
    assert protection.judge(10, DRIFT) is None
    assert protection.judge(10, BROKEN) == "fallback"
    assert (protection.level, protection.reason, protection.fallbacks) == ("off", "quality", 2)
    assert protection.judge(10, BROKEN) is None


@pytest.mark.parametrize(
    "unwell",
    [
        DRIFT,
        BROKEN,
        replace(WELL, drift=0.06),  # below the threshold, but not gone
        replace(WELL, drift=None),
        replace(WELL, sound=False),
    ],
)
def test_it_comes_back_after_patience_without_a_relapse(unwell):
    protection = fresh()
    protection.judge(10, BROKEN)
    assert protection.judge(99, WELL) is None
    assert protection.judge(10, unwell) is None
    assert protection.judge(99, WELL) is None
    assert protection.judge(1, WELL) == "recovery"
    assert (protection.level, protection.reason, protection.recoveries) == ("certified", "", 1)


def test_drift_that_cannot_be_known_does_not_keep_it_away():
    protection = fresh()
    blind = replace(WELL, drift=None, measures_drift=False)
    protection.judge(10, BROKEN)
    assert protection.judge(100, blind) == "recovery"


def test_each_relapse_doubles_the_wait_until_all_is_calm():
    protection, waits = fresh(), []
    for _ in range(7):
        protection.judge(10, DRIFT)
        waits.append(protection.wait)
        assert protection.judge(protection.wait, WELL) == "recovery"
    assert waits == [100, 200, 400, 800, 1600, 1600, 1600]
    protection.judge(1601, WELL)
    protection.judge(10, DRIFT)
    assert protection.wait == 200


def test_text_that_comes_and_goes_does_not_make_it_flap():
    """Every 120 tokens the domain changes: without a growing wait there were 80 changes."""
    protection = fresh()
    changes = [protection.judge(10, DRIFT if step // 12 % 2 else WELL) for step in range(12 * 80)]
    assert sum(change is not None for change in changes) <= 4


@given(st.lists(st.sampled_from([WELL, DRIFT, BROKEN, replace(WELL, drift=0.07)]), max_size=60))
def test_changes_are_consistent_and_rare(signals):
    protection, since = fresh(), 10**9
    for each in signals:
        before = protection.level
        change = protection.judge(20, each)
        assert (change is None) == (protection.level == before)
        assert (protection.level == "certified") == (not protection.reason)
        since += 20
        if change == "recovery":
            assert since >= 100
        if change == "fallback":
            assert each in (DRIFT, BROKEN)
            since = 0
    assert protection.fallbacks - 2 * protection.recoveries <= 2


def test_it_goes_on_where_it_was():
    protection, other = fresh(), fresh()
    for signals in (DRIFT, *[WELL] * 6, DRIFT, *[WELL] * 3):
        protection.judge(20, signals)
    other.restore(protection.to_dict())
    assert other.to_dict() == protection.to_dict()
    for _ in range(12):
        assert other.judge(20, WELL) == protection.judge(20, WELL)
    assert other.level == "certified"


@pytest.mark.parametrize(
    "change",
    [
        {"level": "bold"},
        {"level": "certified", "reason": "drift"},
        {"level": "off", "reason": ""},
        {"well": -1},
        {"since": 1.5},
        {"fallbacks": True},
        {"factor": 0},
        {"factor": 17},
    ],
)
def test_a_state_that_cannot_be_is_refused(change):
    protection = fresh()
    with pytest.raises(CalibrationError):
        protection.restore({**protection.to_dict(), **change})
    assert protection.to_dict() == fresh().to_dict()


def test_a_rung_needs_one():
    held = fresh()
    held.judge(10, DRIFT)
    with pytest.raises(CalibrationError, match="rung"):
        fresh(has_rung=False).restore(held.to_dict())
