"""Online calibration on the micro model: the text changes its kind, and real generation shows it.

The artefact is fitted on "code": chains, each word of which follows from the one before. "Prose" is
made of names and values, which the exits have never seen. What is written is steered by forbidding
the words of the other kind; everything else is sampled by the model itself.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.generation.cycle import Cycle
from sedac_hf.generation.governor import Governor
from sedac_hf.modeling import SedacForCausalLM
from tests.calibration.online.watching import QUICK, TOKENS, Write, limits, share

# -- the domain changes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "fallback", "level", "reason"),
    [
        (1e6, "rung", "rung", "drift"),
        (1e6, "off", "off", "drift"),
        (0.06, "rung", "off", "quality"),
    ],
)
def test_prose_instead_of_code_is_noticed_and_code_comes_back(
    model: SedacForCausalLM,
    write: Write,
    caplog: pytest.LogCaptureFixture,
    tolerance: float,
    fallback: str,
    level: str,
    reason: str,
) -> None:
    quality_alone = {"drift_threshold": 50.0} if reason == "quality" else {}
    calibration = model.attach_calibration(
        limits(tolerance, **quality_alone), fallback=fallback, **QUICK
    )
    for seed in range(3):
        write("code", seed)
    assert calibration.level == "certified"
    before = calibration.to_dict()
    assert before["fallbacks"] == 0
    assert before["drift"] < 0.1
    assert before["ppl_increase"] < 0.06
    assert share(model) > 0.9
    assert not caplog.records

    write("prose", 3)
    assert (calibration.level, calibration.reason) == (level, reason)
    if level == "off":
        # Within the call: what left did so before the change was seen.
        assert 0 < share(model) < 0.5
    model.exit_stats.reset()
    during = calibration.to_dict()
    assert during["fallbacks"] >= 1
    assert during["drift"] > 0.2
    (warning, *_) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "fell back" in warning
    assert "unlike that of calibration" in warning or "cost more" in warning
    write("prose", 4)
    assert (calibration.level, calibration.reason) == (level, reason)
    if level == "off":
        assert share(model) == 0
    else:
        assert calibration.cascade == model.certificate.walk[0].policy.cascade

    model.exit_stats.reset()
    for seed in range(5, 13):
        write("code", seed)
    after = calibration.to_dict()
    assert (after["level"], after["reason"]) == ("certified", "")
    assert after["recoveries"] == 1
    assert after["fallbacks"] == during["fallbacks"]
    share(model)
    write("code", 20)
    assert share(model) > 0.9
    assert calibration.cascade == calibration.chosen


def test_both_kinds_in_turn_do_not_make_it_flap(model: SedacForCausalLM, write: Write) -> None:
    calibration = model.attach_calibration(limits(), **QUICK)
    for seed in range(10):
        write("prose" if seed % 2 else "code", seed)
    found = calibration.to_dict()
    assert 1 <= found["fallbacks"] + found["recoveries"] <= 3


def test_exact_mode_teaches_certified_mode(
    model: SedacForCausalLM, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Governor, "begin", lambda self: Cycle(on=True))
    monkeypatch.setattr(Governor, "worth_asking", lambda self, promise: True)
    monkeypatch.setattr(Governor, "worth_a_level", lambda self, *values: False)
    calibration = model.attach_calibration(limits(drift_threshold=50.0), **QUICK)
    plain = write("prose", 1, "off")
    assert torch.equal(write("prose", 1, "exact"), plain)
    assert calibration.ppl_increase > 0.06
    assert (calibration.level, calibration.reason) == ("off", "quality")
    model.exit_stats.reset()
    write("code", 2)
    assert share(model) == 0
    for seed in range(3, 12):
        write("code", seed, "exact")
    assert calibration.level == "certified"


# -- what it leaves alone ------------------------------------------------------------------------


def test_while_all_is_well_nothing_changes(model: SedacForCausalLM, write: Write) -> None:
    before = [write("code", seed) for seed in range(2)]
    calibration = model.attach_calibration(limits(), **QUICK)
    assert all(torch.equal(write("code", seed), before[seed]) for seed in range(2))
    assert calibration.cascade == model.cascade
    assert calibration.to_dict()["tokens"] == 2 * 8 * (TOKENS - 1)
    assert model.detach_calibration() is calibration
    assert model.calibration is None
    assert torch.equal(write("code", 0), before[0])
    assert calibration.to_dict()["tokens"] == 2 * 8 * (TOKENS - 1)


def test_other_rules_are_not_watched(
    model: SedacForCausalLM, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = model.attach_calibration(limits(), **QUICK)
    with model.cascade_replaced(calibration.cascade):
        pass
    stand_in = copy.deepcopy(model.cascade)
    with model.cascade_replaced(stand_in):
        write("prose", 0)
    assert calibration.to_dict()["tokens"] == 0
    model.set_cascade(model.cascade)
    assert model.calibration is calibration
    model.set_cascade(None)
    assert model.calibration is None
    assert "attach anew" in caplog.text


# -- thresholds that follow a target -------------------------------------------------------------


def test_thresholds_aim_at_a_rate_and_never_above_the_certified(
    model: SedacForCausalLM, write: Write
) -> None:
    (certified,) = model.cascade.layers
    calibration = model.attach_calibration(limits(), target_exit_rate=0.4, **QUICK)
    seen = []
    for seed in range(5):
        write("code", seed)
        seen.append(calibration.cascade.layers[0].threshold)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.2 * certified.threshold
    share(model)
    write("code", 9)
    assert 0.2 < share(model) < 0.7
    assert calibration.to_dict()["updates"]["accepted"] > 5


def test_only_an_explicit_option_loosens(model: SedacForCausalLM, write: Write) -> None:
    # Chains leave, the free word at their beginning does not; the rate asks for both.
    narrow = CascadeConfig([replace(model.cascade.layers[0], threshold=0.25)])
    found = {}
    for name, loosest, target in (("safe", 1.0, 1e-6), ("bold", 3.0, 1e-6), ("slow", 3.0, 1e6)):
        model.set_cascade(narrow)
        calibration = model.attach_calibration(
            limits(1e6, drift_threshold=50.0, throughput_target=target),
            target_exit_rate=0.97, loosest=loosest, **QUICK,
        )  # fmt: skip
        for seed in range(4):
            write("code", seed)
            assert calibration.cascade.layers[0].threshold <= loosest * 0.25
        found[name] = calibration
    assert found["safe"].cascade == found["slow"].cascade == narrow
    assert found["safe"].to_dict()["updates"]["bounded"] > 0
    assert 0.5 < found["bold"].cascade.layers[0].threshold <= 0.75
    assert found["slow"].to_dict()["updates"].keys() == {"throughput"}
    assert found["slow"].throughput > 0
