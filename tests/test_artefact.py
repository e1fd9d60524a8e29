from __future__ import annotations

import ast
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sedac_hf import SedacForCausalLM
from sedac_hf.artefact import artefact_tensors
from sedac_hf.artefact_format import (
    CERTIFICATE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_artefact,
    tensors_digest,
    write_artefact,
)
from sedac_hf.calibration import RiskHistograms
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.errors import (
    ArtefactError,
    BaseNotFoundError,
    CertificateError,
    ConfigError,
    FingerprintError,
    FormatVersionError,
    ModeError,
    SedacError,
)
from tests.artefacts import RULES, issue, load_base, make_tokenizer, save_base, wrap_base
from tests.tiny_models import build_tiny, prompt


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certified artefact, not to be changed."""
    folder = tmp_path_factory.mktemp("artefacts") / "certified"
    wrap_base(load_base(base_folder)).save_pretrained(folder, certificate=issue())
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> SedacForCausalLM:
    return SedacForCausalLM.from_pretrained(folder, **options)


def tokens(model: Any, **options: Any) -> Tensor:
    return model.generate(prompt(2, 5), max_new_tokens=12, do_sample=False, **options)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> None:
    """Write the artefact anew, checksums included, as a faulty program would."""
    files = read_artefact(folder, "artefact")
    write_artefact(folder, files.config | changes, tensors, None)


def warnings_in(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


# -- round trip ----------------------------------------------------------------------------------


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


def test_loading_and_saving_again_changes_nothing(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "again")
    before, after = read_artefact(saved, "before"), read_artefact(tmp_path / "again", "after")
    assert tensors_digest(after.tensors) == tensors_digest(before.tensors)
    assert after.certificate == before.certificate
    assert after.config == before.config


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


def test_histograms_of_other_checkpoints_are_refused(copy: Path) -> None:
    files = read_artefact(copy, "artefact")
    other = RiskHistograms.from_risks(np.random.default_rng(0).random((50, 2)).astype(np.float32))
    rewrite(copy, files.tensors | other.to_tensors())
    with pytest.raises(ArtefactError, match="2 checkpoints, the model has 3"):
        load(copy)


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


# -- the base ------------------------------------------------------------------------------------


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


# -- another base --------------------------------------------------------------------------------


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


# -- how far the certificate reaches --------------------------------------------------------------


def assert_exits_are_off(model: SedacForCausalLM) -> None:
    assert torch.equal(tokens(model), tokens(model.base))
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


# -- damage --------------------------------------------------------------------------------------


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


# -- saving --------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_artefact(
    copy: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model = load(copy)
    monkeypatch.setattr("sedac_hf.artefact.card_of", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_other_processes_write_nothing(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_arguments_of_transformers_are_taken_and_unknown_ones_refused(
    saved: Path, tmp_path: Path
) -> None:
    model = load(saved)
    model.save_pretrained(tmp_path / "out", max_shard_size="1GB", safe_serialization=True)
    assert (tmp_path / "out" / WEIGHTS_FILE).exists()
    with pytest.raises(ArtefactError, match="colour"):
        model.save_pretrained(tmp_path / "out", colour=1)


def test_the_tokenizer_is_found_or_given(base_folder: Path, tmp_path: Path) -> None:
    model = wrap_base(load_base(base_folder))
    model.save_pretrained(tmp_path / "found")
    assert AutoTokenizer.from_pretrained(tmp_path / "found").convert_tokens_to_ids("w07") == 7
    model.save_pretrained(tmp_path / "given", tokenizer=make_tokenizer(chat=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "given").chat_template
    assert "apply_chat_template" in (tmp_path / "given" / "README.md").read_text()


@pytest.mark.parametrize("on_disk", [False, True])
def test_without_a_tokenizer_none_is_made_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_disk: bool
) -> None:
    base = build_tiny("llama")
    if on_disk:
        base.save_pretrained(tmp_path / "base")
        base = load_base(tmp_path / "base")
    wrap_base(base).save_pretrained(tmp_path / "out")
    assert "No tokenizer" in warnings_in(caplog)
    assert not list((tmp_path / "out").glob("token*"))


def test_results_stay_with_the_artefact_and_add_up(base_folder: Path, tmp_path: Path) -> None:
    model = wrap_base(load_base(base_folder))
    fit = {"fit": {"tokens": 5000, "heads": [{"layer_idx": 1, "loss": float("nan")}]}}
    model.save_pretrained(tmp_path / "a", certificate=issue(), results=fit)
    first = ModelCard.load(tmp_path / "a" / "README.md")
    assert "- tokens: 5,000" in first.text
    again = load(tmp_path / "a")
    again.save_pretrained(
        tmp_path / "b", results={"base_ppl": 9.5}, card_metadata={"license": "apache-2.0"}
    )
    second = ModelCard.load(tmp_path / "b" / "README.md")
    assert "- tokens: 5,000" in second.text
    assert "| perplexity of the base | 9.500 |" in second.text
    assert second.data.license == "apache-2.0"
    third = tmp_path / "c"
    load(tmp_path / "b").save_pretrained(third)
    assert ModelCard.load(third / "README.md").data.license == "apache-2.0"


# -- a plain base --------------------------------------------------------------------------------


def test_a_plain_base_gives_a_wrapper_with_exits_off(
    base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(base_folder)
    assert isinstance(model, SedacForCausalLM)
    assert model.config.mode == "off"
    assert model.config.base_model_name_or_path == str(base_folder)
    assert f"sedac fit {base_folder}" in warnings_in(caplog)
    base: PreTrainedModel = load_base(base_folder)
    assert torch.equal(tokens(model), tokens(base))


def test_a_base_for_a_plain_base_makes_no_sense(base_folder: Path) -> None:
    with pytest.raises(ArtefactError, match="not an artefact"):
        load(base_folder, base_model=base_folder)


def test_what_is_neither_folder_nor_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="neither a folder nor found"):
        load(tmp_path / "nowhere")


# -- the Auto classes ----------------------------------------------------------------------------


def test_the_auto_class_loads_an_artefact(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(model, SedacForCausalLM)
    assert torch.equal(tokens(model), tokens(load(saved)))


def test_the_auto_class_hands_settings_on(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        saved, attn_implementation="eager", dtype=torch.bfloat16, mode="exact"
    )
    assert model.base.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    assert model.config.mode == "exact"


def test_the_file_of_code_does_nothing_but_import_the_package(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    module, _, name = config["auto_map"]["AutoModelForCausalLM"].partition(".")
    code = (saved / f"{module}.py").read_text()
    statements = [node for node in ast.parse(code).body if not isinstance(node, ast.Expr)]
    assert [type(node) for node in statements] == [ast.ImportFrom]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace[name] is SedacForCausalLM
