"""Artefacts are fitted on a CUDA device, saved, loaded and moved there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from sedac_hf import SedacForCausalLM, fit
from sedac_hf.calibration.fit_settings import FitSettings
from sedac_hf.config import CheckpointSpec
from tests.artefacts import make_tokenizer
from tests.calibration.test_fitting import micro_texts
from tests.cuda.device import (
    DEVICE,
    LONG,
    assert_lives_there,
    micro_prompts,
    needs_device,
    on,
)
from tests.micro_model import MicroModel
from tests.tiny_models import build_tiny

pytestmark = needs_device


def test_a_saved_model_goes_to_the_device(
    micro_model: MicroModel, exiting: SedacForCausalLM, tmp_path: Path
) -> None:
    folder = micro_model.save(tmp_path / "base")
    here = copy.deepcopy(exiting)
    with torch.no_grad():
        for parameter in here.exit_heads.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))  # heads are stored in bf16
    here.config.base_model_name_or_path = str(folder)
    here.save_pretrained(tmp_path / "artefact")
    there = SedacForCausalLM.from_pretrained(tmp_path / "artefact")
    there.set_cascade(there.cascade)  # exits act although there is no certificate
    given = micro_prompts(micro_model, 2)
    wanted = {}
    for mode in ("plain", "exact", "certified"):
        wanted[mode] = here.generate(**given, **LONG, sedac_mode=mode)
        # What was derived for the CPU must not stay behind when the model moves.
        assert torch.equal(there.generate(**given, **LONG, sedac_mode=mode), wanted[mode]), mode
    there = there.to(DEVICE)
    assert_lives_there(there)
    for mode, expected in wanted.items():
        found = there.generate(**on(given, DEVICE), **LONG, sedac_mode=mode)
        assert found.device.type == DEVICE.type
        assert torch.equal(found.cpu(), expected), mode
    back = there.to("cpu").generate(**given, **LONG, sedac_mode="certified")
    assert torch.equal(back, wanted["certified"])


def test_fit_leaves_heads_on_the_device_and_an_artefact_for_any(
    micro_model: MicroModel, tmp_path: Path
) -> None:
    base = copy.deepcopy(micro_model.model).to(DEVICE)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    settings = FitSettings(
        checkpoints=(CheckpointSpec(1, feedback=True),), budget_seconds=20.0, draft_words=48,
        probe_rank=8, costs="measured", epochs=4.0, learning_rate=3e-3, epsilon=0.06,
    )  # fmt: skip
    model, report = fit(
        base,
        micro_texts(micro_model, 160),
        tokenizer=micro_model.tokenizer,
        output_dir=tmp_path / "artefact",
        settings=settings,
        progress=False,
    )
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not torch.backends.cuda.matmul.allow_tf32, "a fit leaves settings as they were"
    assert_lives_there(model)
    assert report.heads[0].agreement > 0.3
    again = SedacForCausalLM.from_pretrained(tmp_path / "artefact", base_model=micro_model.model)
    assert {value.device.type for value in again.parameters()} == {"cpu"}
    assert again.cascade == model.cascade
    given = micro_prompts(micro_model, 4)
    expected = micro_model.model.generate(**given, **LONG)
    for each in (model, again):
        assert torch.equal(each.generate(**on(given, each.device), **LONG).cpu(), expected)


def test_fit_reads_what_the_base_writes_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEDAC_COMPILE", "off")  # the other fit compiles what it can
    base = build_tiny("llama", eos_token_id=None).to(DEVICE)
    settings = FitSettings(
        checkpoints=(CheckpointSpec(0),), budget_seconds=20.0, text_tokens=24_000,
        draft_words=40, probe_rank=4, costs="parameters", epochs=0.5,
    )  # fmt: skip
    model, report = fit(
        base, tokenizer=make_tokenizer(), output_dir=tmp_path / "artefact", settings=settings,
        progress=False,
    )  # fmt: skip
    assert report.self_written
    assert report.written_tokens > 10_000
    assert_lives_there(model)
