"""Online calibration: its state on disk, what it is attached to, and what it refuses."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf.calibration import OnlineCalibration, RiskHistograms
from sedac_hf.errors import CalibrationError, ConfigError
from sedac_hf.modeling import SedacForCausalLM
from tests.calibration.online.watching import QUICK, TOKENS, Write, limits
from tests.micro_model import MicroModel

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
