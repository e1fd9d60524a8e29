"""The `sedac` command called by tests, and a base, an artefact and texts for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sedac_hf.cli import app
from tests.artefacts import issue, load_base, make_tokenizer, save_base, wrap_base

__all__ = ["Result", "Runner", "artefact", "base", "call", "parsed", "sedac", "texts"]

# What the runner returns is typed by whichever click typer brings along.
Result = Any
Runner = Callable[..., Result]


def call(*arguments: object, stdin: str | None = None) -> Result:
    """Call the command in this process and check that no traceback ever shows."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def sedac() -> Runner:
    """See `call`."""
    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base with a tokenizer, on disk."""
    return save_base(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def artefact(base: Path) -> Path:
    """An artefact of that base whose tokens leave at three checkpoints."""
    folder = base.parent / "artefact"
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    model.save_pretrained(folder, tokenizer=make_tokenizer(), certificate=issue())
    return folder


@pytest.fixture(scope="module")
def texts(base: Path) -> Path:
    """Twelve documents with prompts, as JSON lines."""
    generator = torch.Generator().manual_seed(1)
    path = base.parent / "texts.jsonl"
    with path.open("w") as stream:
        for _ in range(12):
            ids = torch.randint(4, 60, (24,), generator=generator).tolist()
            words = [f"w{i}" for i in ids]
            record = {"prompt": " ".join(words[:6]), "completion": " ".join(words[6:])}
            stream.write(json.dumps(record) + "\n")
    return path


def parsed(result: Result) -> dict[str, Any]:
    """The one object on standard output."""
    values = json.loads(result.stdout)
    assert isinstance(values, dict)
    return values
