"""How far a certificate reaches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.artefact_format import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    read_artefact,
    write_artefact,
)
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.errors import (
    ArtefactError,
    CertificateError,
)
from tests.artefacts import (
    RULES,
    issue,
    load,
    load_base,
    save_base,
    tokens,
    warnings_in,
    wrap_base,
)


def assert_exits_are_off(model: SedacForCausalLM) -> None:
    if model.dtype == torch.float32:  # in bfloat16 rounding alone may part plain from the base
        assert torch.equal(tokens(model), tokens(model.base))
    assert torch.equal(tokens(model), tokens(model, sedac_mode="plain"))
    assert model.exit_stats.tokens > 0
    assert model.exit_stats.exit_share == 0


def test_another_dtype_is_not_certified(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(saved, dtype=torch.bfloat16)
    assert "'float32', the model runs with 'bfloat16'" in warnings_in(caplog)
    assert "exits off" in warnings_in(caplog)
    assert_exits_are_off(model)


def test_without_asking_the_certified_dtype_is_loaded(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    wrapped = wrap_base(load_base(base, dtype=torch.float32))
    wrapped.save_pretrained(tmp_path / "artefact", certificate=issue())
    assert load(tmp_path / "artefact").dtype == torch.float32
    assert load(tmp_path / "artefact", dtype="auto").dtype == torch.float32
    assert load(tmp_path / "artefact", dtype=torch.bfloat16, mode="off").dtype == torch.bfloat16


def test_another_kv_mode_is_not_certified(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = wrap_base(load_base(base_folder))
    wrapped.save_pretrained(tmp_path / "artefact", certificate=issue(kv_mode="settle"))
    model = load(tmp_path / "artefact")
    assert "K/V mode 'settle'" in warnings_in(caplog)
    assert_exits_are_off(model)


@pytest.mark.parametrize("certificate", [None, issue(passes=False)])
def test_without_a_certified_policy_exits_stay_off(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, certificate: Any
) -> None:
    wrapped = wrap_base(load_base(base_folder))
    wrapped.save_pretrained(tmp_path / "artefact", certificate=certificate)
    model = load(tmp_path / "artefact")
    assert "exits off" in warnings_in(caplog)
    assert_exits_are_off(model)


def test_rules_set_by_hand_act_again(base_folder: Path, tmp_path: Path) -> None:
    wrapped = wrap_base(load_base(base_folder))
    wrapped.save_pretrained(tmp_path / "artefact")
    model = load(tmp_path / "artefact")
    model.set_cascade(model.cascade)
    assert torch.equal(tokens(model), tokens(wrapped))
    assert model.exit_stats.exit_share > 0


def test_a_certificate_for_other_thresholds_is_not_saved(base_folder: Path, tmp_path: Path) -> None:
    other = CascadeConfig([replace(RULES[0], threshold=0.4), *RULES[1:]])
    with pytest.raises(CertificateError, match=r"cascade\.threshold"):
        wrap_base(load_base(base_folder)).save_pretrained(
            tmp_path / "artefact", certificate=issue(other)
        )
    assert not (tmp_path / "artefact").exists()


def test_a_certificate_does_not_survive_a_change_of_weights(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(saved)
    with torch.no_grad():
        next(model.exit_heads.parameters()).add_(1.0)
    model.save_pretrained(tmp_path / "changed")
    assert "Certify again" in warnings_in(caplog)
    assert not (tmp_path / "changed" / CERTIFICATE_FILE).exists()
    assert json.loads((tmp_path / "changed" / CONFIG_FILE).read_text())["certified_dtypes"] == []


def test_a_malformed_certificate_is_named(base_folder: Path, copy: Path) -> None:
    files = read_artefact(copy, "artefact")
    assert files.certificate is not None
    write_artefact(copy, files.config, files.tensors, files.certificate | {"accepted": 5})
    with pytest.raises(CertificateError, match=CERTIFICATE_FILE):
        load(copy)


def test_a_certificate_of_another_base_is_refused(copy: Path) -> None:
    files = read_artefact(copy, "artefact")
    assert files.certificate is not None
    other = json.loads(json.dumps(files.config["fingerprint"]))
    other["weights"]["head"] = "0" * 64
    write_artefact(copy, files.config, files.tensors, files.certificate | {"fingerprint": other})
    with pytest.raises(ArtefactError, match="another base"):
        load(copy)
