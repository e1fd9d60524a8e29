"""Saving as a whole or not at all; tokenizers, results; plain bases and Auto classes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sedac_hf import SedacForCausalLM
from sedac_hf.artefact_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
)
from sedac_hf.errors import (
    ArtefactError,
)
from tests.artefacts import (
    issue,
    load,
    load_base,
    make_tokenizer,
    tokens,
    warnings_in,
    wrap_base,
)
from tests.tiny_models import build_tiny


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
