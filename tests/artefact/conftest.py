"""A base and an artefact of it on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artefacts import issue, load_base, save_base, wrap_base


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
