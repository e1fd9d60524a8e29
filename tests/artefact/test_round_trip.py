"""What was saved comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sedac_hf import SedacForCausalLM
from sedac_hf.artefact import artefact_tensors
from sedac_hf.artefact_format import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_artefact,
    tensors_digest,
)
from sedac_hf.calibration import RiskHistograms
from sedac_hf.config import SedacConfig
from tests.artefacts import (
    issue,
    load,
    load_base,
    make_tokenizer,
    tokens,
    wrap_base,
)
from tests.tiny_models import build_tiny


def test_a_loaded_model_exits_where_the_saved_one_did(base_folder: Path, saved: Path) -> None:
    original = wrap_base(load_base(base_folder))
    loaded = load(saved)
    assert torch.equal(tokens(loaded), tokens(original))
    assert loaded.exit_stats.exits_by_layer == original.exit_stats.exits_by_layer
    assert 0 < loaded.exit_stats.exit_share <= 1
    stored, expected = artefact_tensors(loaded), artefact_tensors(original)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert not loaded.training


def test_configuration_and_certificate_come_back(saved: Path, base_folder: Path) -> None:
    model = load(saved)
    assert model.config.base_model_name_or_path == str(base_folder)
    assert model.config.certified_dtypes == ["float32"]
    assert model.config.mode == "certified"
    assert model.certificate == issue()
    assert model.config.name_or_path == str(saved)
    assert model.certificate is not None
    model.certificate.check_covers(dtype="float32", kv_mode="propagate", cascade=model.cascade)


def test_every_field_of_the_configuration_comes_back(base_folder: Path, tmp_path: Path) -> None:
    model = wrap_base(load_base(base_folder))
    hits = [[0.1 * k, 0.2, 0.3, 0.4] for k in range(len(model.exit_heads))]
    changes = {"max_pending": 5, "head_hits": hits, "kv_mode": "settle", "mode": "exact"}
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    own = {name for name in SedacConfig.__annotations__ if not name.startswith(("_", "model_type"))}
    kept = own - {"sub_configs_defaults", "text_config", "use_cache", "fingerprint"}
    assert kept > changes.keys()
    found = {name: getattr(loaded.config, name) for name in kept}
    assert found == {name: getattr(model.config, name) for name in kept}


def test_loading_and_saving_again_changes_nothing(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "again")
    before, after = read_artefact(saved, "before"), read_artefact(tmp_path / "again", "after")
    assert tensors_digest(after.tensors) == tensors_digest(before.tensors)
    assert after.certificate == before.certificate
    assert after.config == before.config


def test_files_of_an_artefact(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    expected = {CONFIG_FILE, WEIGHTS_FILE, CERTIFICATE_FILE, "README.md", "tokenizer.json"}
    assert expected <= names
    assert not any(
        name.startswith(("model", "adapter_config")) for name in names - {"modeling_sedac.py"}
    )
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert config["model_type"] == "sedac"
    assert config["text_config"]["model_type"] == "llama"
    assert set(config["fingerprint"]) == {"version", "shape", "weights"}
    assert "_name_or_path" not in config["text_config"]


def test_heads_are_stored_in_bf16_and_thresholds_in_float32(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    kinds = {name.split(".")[0]: set() for name in tensors}
    for name, value in tensors.items():
        kinds[name.split(".")[0]].add(value.dtype)
    assert kinds == {
        "heads": {torch.bfloat16},
        "probes": {torch.float32},
        "draft_vocabulary": {torch.int64},
        "cascade": {torch.float32},
    }


def test_a_low_rank_delta_comes_back(base_folder: Path, tmp_path: Path) -> None:
    from sedac_hf.config import CheckpointSpec

    spec = CheckpointSpec(1, "block", storage="delta", delta_rank=4)
    model = SedacForCausalLM.from_base(load_base(base_folder), [spec])
    with torch.no_grad():
        weight = model.exit_heads[0].layers[0].mlp.up_proj.weight
        weight.add_(torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1]))
    model.save_pretrained(tmp_path / "delta")
    loaded = load(tmp_path / "delta", mode="off")
    assert torch.allclose(loaded.exit_heads[0].layers[0].mlp.up_proj.weight, weight, atol=0.05)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "gemma3", "mixtral"])
def test_other_architectures_come_back(name: str, tmp_path: Path) -> None:
    build_tiny(name).save_pretrained(tmp_path / "base")
    original = wrap_base(load_base(tmp_path / "base"))
    original.save_pretrained(tmp_path / "artefact", tokenizer=make_tokenizer())
    loaded = load(tmp_path / "artefact", mode="off")
    loaded.set_cascade(loaded.cascade)
    assert torch.equal(
        tokens(loaded, sedac_mode="certified"), tokens(original, sedac_mode="certified")
    )


def test_the_base_is_untouched_by_saving_and_loading(base_folder: Path, tmp_path: Path) -> None:
    base = load_base(base_folder)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    attention = base.config._attn_implementation
    wrap_base(base).save_pretrained(tmp_path / "artefact", certificate=issue())
    load(tmp_path / "artefact", base_model=base)
    assert base.config._attn_implementation == attention
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_histograms_of_risks_come_back_and_leave_the_certificate_alone(
    saved: Path, tmp_path: Path
) -> None:
    model = load(saved)
    assert model.risk_histograms is None  # as in artefacts of earlier versions
    rng = np.random.default_rng(0)
    model.risk_histograms = RiskHistograms.from_risks(rng.random((500, 3)).astype(np.float32))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.certificate == issue()
    assert again.exits_off_reason is None
    assert again.risk_histograms is not None
    assert np.array_equal(again.risk_histograms.edges, model.risk_histograms.edges)
    assert np.array_equal(again.risk_histograms.counts, model.risk_histograms.counts)
