"""Which base an artefact is put on, and which ones it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sedac_hf.errors import (
    ArtefactError,
    BaseNotFoundError,
    ConfigError,
    FingerprintError,
    ModeError,
)
from tests.artefacts import (
    edit_config,
    issue,
    load,
    load_base,
    save_base,
    tokens,
    warnings_in,
    wrap_base,
)
from tests.tiny_models import prompt


@pytest.mark.parametrize("kind", ["object", "path", "text"])
def test_the_base_may_be_given(saved: Path, base_folder: Path, tmp_path: Path, kind: str) -> None:
    import shutil

    moved = Path(shutil.copytree(base_folder, tmp_path / "elsewhere"))
    given: Any = {"object": load_base(moved), "path": moved, "text": str(moved)}[kind]
    model = load(saved, base_model=given)
    if kind == "object":
        assert model.base is given
    else:
        assert model.config.base_model_name_or_path == str(moved)
    assert model.config.base_model_revision is None
    assert torch.equal(tokens(model), tokens(load(saved)))


def test_a_missing_base_is_an_error_that_says_what_to_do(copy: Path) -> None:
    edit_config(copy, base_model_name_or_path=".models/gone")
    with pytest.raises(BaseNotFoundError, match=r"base_model=.*--base"):
        load(copy)


def test_an_artefact_without_the_name_of_its_base_wants_one(copy: Path, base_folder: Path) -> None:
    edit_config(copy, base_model_name_or_path=None)
    with pytest.raises(BaseNotFoundError, match="does not name its base"):
        load(copy)
    assert load(copy, base_model=base_folder).config.base_model_name_or_path == str(base_folder)


def test_base_and_artefact_in_one_checkout_find_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    save_base(Path(".models/base"))
    model = wrap_base(load_base(Path(".models/base").resolve()))
    model.save_pretrained("examples/artefact", certificate=issue())
    assert json.loads(Path("examples/artefact/config.json").read_text())[
        "base_model_name_or_path"
    ] == str(Path(".models/base"))
    shutil.move(str(tmp_path / "examples"), str(tmp_path / "moved" / "examples"))
    shutil.move(str(tmp_path / ".models"), str(tmp_path / "moved" / ".models"))
    monkeypatch.chdir("/")
    assert len(load(tmp_path / "moved" / "examples" / "artefact").exit_heads) == 3


def test_the_base_can_be_saved_inside(base_folder: Path, tmp_path: Path) -> None:
    import shutil

    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    model = wrap_base(load_base(base))
    expected = tokens(model)
    model.save_pretrained(tmp_path / "whole", certificate=issue(), save_base_model=True)
    shutil.rmtree(base)
    shutil.move(str(tmp_path / "whole"), str(tmp_path / "moved"))
    assert torch.equal(tokens(load(tmp_path / "moved")), expected)
    assert "part of it" in (tmp_path / "moved" / "README.md").read_text()


def test_a_base_with_adapters_is_not_saved_inside(base_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = get_peft_model(load_base(base_folder), LoraConfig(target_modules=["q_proj"]))
    model = wrap_base(base)
    with pytest.raises(ArtefactError, match="Merge them first"):
        model.save_pretrained(tmp_path / "out", save_base_model=True)
    assert not (tmp_path / "out").exists()


def test_an_adapted_base_is_another_base(saved: Path, base_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = get_peft_model(load_base(base_folder), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FingerprintError, match="other weights"):
        load(saved, base_model=base)
    assert "certified" in load(saved, base_model=base, mode="exact").refused_modes


def test_settings_for_the_base_reach_the_base(saved: Path) -> None:
    model = load(saved, dtype=torch.float32, attn_implementation="eager")
    assert model.base.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_settings_of_a_loaded_base_must_be_the_ones_it_has(saved: Path, base_folder: Path) -> None:
    base = load_base(base_folder)
    load(saved, base_model=base, dtype="float32")
    with pytest.raises(ConfigError, match="is a loaded one"):
        load(saved, base_model=base, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="device_map"):
        load(saved, base_model=base, device_map="cpu")


def test_code_of_the_base_is_trusted_only_by_the_user(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = AutoModelForCausalLM.from_pretrained.__func__

    def spy(cls: type, name: Any, *args: Any, **options: Any) -> Any:
        seen.append(options.get("trust_remote_code", "not given"))
        return original(cls, name, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(spy))
    load(saved)
    load(saved, trust_remote_code=True)
    assert seen == ["not given", True]


def test_an_offloaded_base_carries_the_artefact(saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    places |= {"model.layers.2": "disk", "model.layers.3": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = load(saved, device_map=places, offload_folder=str(tmp_path / "off"))
    assert model.base.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(tokens(model), tokens(load(saved)))


def test_other_weights_are_refused_in_certified_mode(saved: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match=r"Certified mode is refused.*mode='exact'"):
        load(saved, base_model=other)


def test_other_weights_load_in_exact_mode_with_a_warning(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base(save_base(tmp_path / "other", seed=1))
    model = load(saved, base_model=base, mode="exact")
    assert "other weights" in warnings_in(caplog)
    assert torch.equal(tokens(model), tokens(base))
    with pytest.raises(ModeError, match="other weights"):
        model.generate(prompt(1, 3), sedac_mode="certified", max_new_tokens=2)


@pytest.mark.parametrize("mode", ["certified", "exact", "off"])
def test_another_shape_is_refused_in_every_mode(saved: Path, mode: str, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(FingerprintError, match="hidden_size: expected 32, found 64"):
        load(saved, base_model=other, mode=mode)


def test_an_unknown_mode_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="quick"):
        load(tmp_path / "nowhere", mode="quick")
