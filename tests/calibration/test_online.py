"""Online calibration on the micro model: the text changes its kind, and real generation shows it.

The artefact is fitted on "code": chains, each word of which follows from the one before. "Prose" is
made of names and values, which the exits have never seen. What is written is steered by forbidding
the words of the other kind; everything else is sampled by the model itself.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedac_hf.calibration import DualMetricCalibration, OnlineCalibration, RiskHistograms
from sedac_hf.calibration.fit_settings import FitSettings
from sedac_hf.calibration.fitting import fit
from sedac_hf.calibration.safe_rules import with_thresholds
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.errors import CalibrationError, ConfigError
from sedac_hf.generation.governor import Cycle, Governor
from sedac_hf.modeling import SedacForCausalLM
from tests.micro_model import CHAIN_LENGTH, CHAINS, NAMES, VALUES, MicroModel

SETTINGS = FitSettings(
    checkpoints=(CheckpointSpec(1),),
    budget_seconds=600.0,
    draft_words=64,
    probe_rank=8,
    costs="parameters",
    epochs=6.0,
    learning_rate=3e-3,
    epsilon=0.06,
    storage="whole",
)
QUICK: dict[str, Any] = {"memory": 256, "patience": 128, "full_depth_share": 0.2}
TOKENS = 60
Write = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def artefact(micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted on chains alone; its certificate walks from stricter thresholds to those it chose."""
    rng = np.random.default_rng(5)
    letters = "abcde"[:CHAIN_LENGTH]
    texts = [
        " ".join(f"k{c}{x}" for c in rng.integers(CHAINS, size=9) for x in letters)
        for _ in range(260)
    ]
    output = tmp_path_factory.mktemp("online") / "artefact"
    model, _ = fit(
        micro_model.model,
        texts,
        tokenizer=micro_model.tokenizer,
        output_dir=output,
        settings=SETTINGS,
        progress=False,
    )
    assert model.certificate is not None
    first = model.certificate.walk[0]
    stricter = {each.layer_idx: each.threshold / 2 for each in first.policy.cascade.layers}
    safer = replace(first.policy, cascade=with_thresholds(first.policy.cascade, stricter))
    walked = replace(
        model.certificate,
        walk=(replace(first, policy=safer), *model.certificate.walk),
        accepted=model.certificate.accepted + 1,
    )
    model.save_pretrained(output, tokenizer=micro_model.tokenizer, certificate=walked)
    return output


@pytest.fixture
def model(artefact: Path, micro_model: MicroModel) -> SedacForCausalLM:
    return SedacForCausalLM.from_pretrained(artefact, base_model=micro_model.model)


@pytest.fixture
def write(model: SedacForCausalLM, micro_model: MicroModel) -> Write:
    """Lets a model write texts of one kind."""
    ids = micro_model.language.ids
    code = [ids[f"k{c}a"] for c in range(CHAINS)]
    names = [ids[f"n{i}"] for i in range(NAMES)]
    prose = [*names, ids["roll"], *(ids[f"v{i}"] for i in range(VALUES))]
    never = [ids[word] for word in ("<pad>", "<bos>", "<eos>", "<unk>")]

    def run(kind: str, seed: int = 0, mode: str = "certified", by: Any = model) -> torch.Tensor:
        heads, others = (code, prose) if kind == "code" else (names, code)
        prompt = torch.tensor([[ids["<bos>"], heads[row % 8]] for row in range(8)])
        torch.manual_seed(seed)
        return by.generate(
            prompt,
            max_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            suppress_tokens=[*never, *others],
            eos_token_id=None,
            pad_token_id=0,
            sedac_mode=mode,
        )

    return run


def limits(ppl_tolerance: float = 0.06, **values: float) -> DualMetricCalibration:
    return DualMetricCalibration(ppl_tolerance=ppl_tolerance, **values)


def share(model: SedacForCausalLM) -> float:
    """Share of exits since the last time."""
    found = model.exit_stats.exit_share
    model.exit_stats.reset()
    return found


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
    monkeypatch.setattr(Governor, "worth_a_level", lambda self, level, parents, depth: level < 1)
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


# -- its state -----------------------------------------------------------------------------------


def test_a_state_survives_a_save_and_a_load(
    model: SedacForCausalLM, write: Write, micro_model: MicroModel, tmp_path: Path
) -> None:
    calibration = model.attach_calibration(limits(), seed=3, **QUICK)
    write("code", 0)
    write("prose", 1)
    assert calibration.level == "off"
    model.save_pretrained(tmp_path / "again", tokenizer=micro_model.tokenizer)
    calibration.save(tmp_path / "calibration.json")

    loaded = SedacForCausalLM.from_pretrained(
        tmp_path / "again", base_model=micro_model.model, mode="certified"
    )
    resumed = loaded.attach_calibration(tmp_path / "calibration.json")
    assert resumed.state() == calibration.state()
    assert resumed.to_dict() == calibration.to_dict()
    assert resumed.settings == calibration.settings
    for seed in range(2, 9):
        one, other = write("code", seed), write("code", seed, by=loaded)
        assert torch.equal(one, other)
    assert resumed.level == calibration.level == "certified"
    assert resumed.to_dict()["recoveries"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=2), "version"),
        (lambda s: s.update(made_for="0"), "other thresholds"),
        (lambda s: s.pop("quality"), "quality"),
        (lambda s: s["quality"].update(rise=[-1.0]), "at least 0"),
        (lambda s: s["drift"].update(counts=[[1.0]]), "shape"),
        (lambda s: s["protection"].update(level="bold"), "bold"),
        (lambda s: s["rules"]["thresholds"].update({"1": 1e9}), "outside"),
        (lambda s: s["rules"].update(ppl_tolerance="wide"), "ppl_tolerance"),
        (lambda s: s["settings"].update(memory=-1), "memory"),
        (lambda s: s["settings"].update(memories=8), "memories"),
        (lambda s: s.update(tokens="many"), "whole numbers"),
        (lambda s: s.clear(), "missing field"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused(
    model: SedacForCausalLM, tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "state.json"
    model.attach_calibration(limits(), **QUICK).save(path)
    good = model.calibration
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(CalibrationError, match=message) as caught:
        model.attach_calibration(path)
    assert str(path) in str(caught.value)
    assert model.calibration is good


def test_what_is_no_state_is_refused(model: SedacForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[1]")
    for name in ("a.json", "b.json", "none.json"):
        with pytest.raises(CalibrationError, match=name):
            model.attach_calibration(tmp_path / name)
    with pytest.raises(CalibrationError, match="of its own"):
        model.attach_calibration(tmp_path / "a.json", memory=64)


def test_a_copy_of_the_model_can_be_made(model: SedacForCausalLM, write: Write) -> None:
    calibration = model.attach_calibration(limits(), **QUICK)
    write("code", 0)
    other = copy.deepcopy(model)
    assert other.calibration is not calibration
    assert other.calibration.state() == calibration.state()
    write("code", 1, by=other)
    assert calibration.to_dict()["tokens"] == 8 * (TOKENS - 1)


# -- the rest ------------------------------------------------------------------------------------


def test_fit_stores_the_risks_of_calibration(model: SedacForCausalLM) -> None:
    histograms = model.risk_histograms
    assert histograms is not None
    assert histograms.num_checkpoints == 1
    assert histograms.counts.sum() > 500


def test_calls_in_several_threads_are_all_counted(model: SedacForCausalLM, write: Write) -> None:
    calibration = model.attach_calibration(limits(), **QUICK)
    write("code", 0)
    threads = [threading.Thread(target=write, args=("code", seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calibration.to_dict()["tokens"] == 4 * 8 * (TOKENS - 1)
    assert calibration.level == "certified"


def test_steps_by_hand_are_seen_too(model: SedacForCausalLM, micro_model: MicroModel) -> None:
    calibration = model.attach_calibration(limits(), **QUICK)
    model.config.mode = "certified"
    ids = torch.tensor([[micro_model.language.ids[w] for w in ("<bos>", "k1a")]])
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        for word in ("k1b", "k1c", "k1d"):
            step = torch.tensor([[micro_model.language.ids[word]]])
            model(input_ids=step, past_key_values=cache, use_cache=True)
    assert calibration.to_dict()["tokens"] == 3


def test_without_histograms_quality_alone_is_watched(
    model: SedacForCausalLM, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    model.risk_histograms = None
    calibration = model.attach_calibration(limits(), **QUICK)
    assert "drift cannot be seen" in caplog.text
    write("code", 0)
    write("prose", 1)
    assert (calibration.reason, calibration.drift) == ("quality", None)
    for seed in range(2, 9):
        write("code", seed)
    assert calibration.level == "certified"


def test_histograms_can_be_measured_later(model: SedacForCausalLM, micro_model: MicroModel) -> None:
    from sedac_hf.calibration.documents import encode_texts

    texts = [" ".join(f"k{(n + m) % 8}{x}" for m in range(6) for x in "abcde") for n in range(40)]
    documents = list(encode_texts(texts, micro_model.tokenizer, max_length=64))
    found = RiskHistograms.measure(model, documents)
    assert found.counts.sum() == sum(len(d) - max(d.prompt_length, 1) - 1 for d in documents)


def test_a_model_without_rules_and_settings_that_are_none_are_refused(
    model: SedacForCausalLM,
) -> None:
    for wrong in (
        {"memory": 1},
        {"patience": 0},
        {"recovery": 0.0},
        {"audit_share": 1.5},
        {"full_depth_share": 0},
        {"fallback": "none"},
        {"target_exit_rate": 1.0},
        {"loosest": 0.5},
        {"loosest": float("inf")},
        {"hurry": True},
    ):
        with pytest.raises(ConfigError):
            model.attach_calibration(**wrong)
    model.set_cascade(None)
    with pytest.raises(CalibrationError, match="no rules"):
        model.attach_calibration()


def test_names_are_where_they_are_promised() -> None:
    import sedac_hf.calibration as home

    assert isinstance(home.OnlineCalibration, type)
    assert OnlineCalibration is home.OnlineCalibration
    assert set(home.__all__) <= set(dir(home))
    with pytest.raises(AttributeError):
        _ = home.nothing
