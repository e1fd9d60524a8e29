"""Damaged files are clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sedac_hf.artefact_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_artefact,
)
from sedac_hf.calibration import RiskHistograms
from sedac_hf.errors import (
    ArtefactError,
    FormatVersionError,
    SedacError,
)
from tests.artefacts import (
    edit_config,
    load,
    load_base,
    rewrite,
)
from tests.tiny_models import prompt


def cut_short(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def newer_format(folder: Path) -> None:
    edit_config(folder, sedac_format_version=7)


def nan_threshold(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["cascade.threshold"][1] = float("nan")
    rewrite(folder, tensors)


def threshold_out_of_range(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["cascade.min_probability"][0] = 1.5
    rewrite(folder, tensors)


def missing_head(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, {k: v for k, v in tensors.items() if not k.startswith("heads.1.up")})


def missing_probe(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, {k: v for k, v in tensors.items() if k != "probes.2.out.bias"})


def missing_threshold(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, {k: v for k, v in tensors.items() if k != "cascade.decay"})


def unexpected_tensor(folder: Path) -> None:
    rewrite(folder, load_file(folder / WEIGHTS_FILE) | {"heads.9.x": torch.zeros(1)})


def wrong_head_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, tensors | {"heads.1.up.bias": torch.zeros(5)})


def wrong_probe_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, tensors | {"probes.0.project.weight": torch.zeros(64, 7)})


def wrong_threshold_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, tensors | {"cascade.threshold": torch.zeros(7)})


def draft_vocabulary_out_of_range(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, tensors | {"draft_vocabulary": torch.tensor([1, 5000])})


def checkpoint_beyond_the_base(folder: Path) -> None:
    files = read_artefact(folder, "artefact")
    points = [*files.config["checkpoints"][:2], files.config["checkpoints"][2] | {"layer_idx": 40}]
    rewrite(folder, files.tensors, checkpoints=points)


def unknown_checkpoint_field(folder: Path) -> None:
    files = read_artefact(folder, "artefact")
    rewrite(folder, files.tensors, checkpoints=[{**files.config["checkpoints"][0], "colour": 1}])


def missing_field(folder: Path) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    del config["fingerprint"]
    path.write_text(json.dumps(config))


def unknown_strategy(folder: Path) -> None:
    rewrite(folder, load_file(folder / WEIGHTS_FILE), strategy="wild")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_short, ArtefactError, rf"{WEIGHTS_FILE} is damaged: expected \d+ bytes"),
        (flip_a_byte, ArtefactError, rf"{WEIGHTS_FILE} is damaged or was changed"),
        (newer_format, FormatVersionError, rf"{CONFIG_FILE} says format version 7"),
        (nan_threshold, ArtefactError, rf"{WEIGHTS_FILE}.*cascade.threshold' holds NaN"),
        (threshold_out_of_range, ArtefactError, rf"{WEIGHTS_FILE}.*min_probability"),
        (missing_head, ArtefactError, rf"{WEIGHTS_FILE}.*missing \['up"),
        (missing_probe, ArtefactError, rf"{WEIGHTS_FILE}.*missing \['probes.2.out.bias'\]"),
        (missing_threshold, ArtefactError, rf"{WEIGHTS_FILE}.*cascade.decay' is missing"),
        (unexpected_tensor, ArtefactError, rf"{WEIGHTS_FILE}.*no place: \['heads.9.x'\]"),
        (wrong_head_shape, ArtefactError, rf"{WEIGHTS_FILE}.*wrong shape \['up.bias'\]"),
        (wrong_probe_shape, ArtefactError, rf"{WEIGHTS_FILE}.*\[64, 7\] and should be \[64, 32\]"),
        (wrong_threshold_shape, ArtefactError, rf"{WEIGHTS_FILE}.*cascade.threshold"),
        (draft_vocabulary_out_of_range, ArtefactError, rf"{WEIGHTS_FILE}.*5000"),
        (checkpoint_beyond_the_base, ArtefactError, "layer_idx may be at most 2"),
        (unknown_checkpoint_field, ArtefactError, rf"{CONFIG_FILE}.*colour"),
        (missing_field, ArtefactError, rf"{CONFIG_FILE}.*'fingerprint' is missing"),
        (unknown_strategy, ArtefactError, rf"{CONFIG_FILE}.*strategy.*wild"),
    ],
)
def test_damage_is_a_clear_error_and_nothing_is_half_loaded(
    copy: Path, base_folder: Path, damage: Any, error: type[SedacError], message: str
) -> None:
    base = load_base(base_folder)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    damage(copy)
    with pytest.raises(error, match=message):
        load(copy, base_model=base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert torch.isfinite(base(prompt(1, 4)).logits).all()


def test_histograms_of_other_checkpoints_are_refused(copy: Path) -> None:
    files = read_artefact(copy, "artefact")
    other = RiskHistograms.from_risks(np.random.default_rng(0).random((50, 2)).astype(np.float32))
    rewrite(copy, files.tensors | other.to_tensors())
    with pytest.raises(ArtefactError, match="2 checkpoints, the model has 3"):
        load(copy)
