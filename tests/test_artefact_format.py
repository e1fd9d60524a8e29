from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sedac_hf import artefact_format
from sedac_hf.artefact_format import (
    CARD_SOURCE_FILE,
    CERTIFICATE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    atomic_directory,
    read_artefact,
    tensors_digest,
    write_artefact,
)
from sedac_hf.errors import ArtefactError, FormatVersionError

CONFIG: dict[str, Any] = {
    "model_type": "sedac",
    "base_model_name_or_path": "org/base",
    "base_model_revision": "0" * 40,
    "checkpoints": [{"layer_idx": 1}],
    "probe_rank": 4,
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "probes.0.weight": torch.randn(4, 8, generator=generator),
        "heads.0.weight": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "draft_ids": torch.arange(5),
        "cascade.threshold": torch.tensor([0.5]),
        "scalar": torch.tensor(2.0),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "artefact"
    with atomic_directory(target) as fresh:
        write_artefact(fresh, CONFIG, tensors(), {"epsilon": 0.01})
        (fresh / CARD_SOURCE_FILE).write_text('{"results": {}}')
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read(folder: Path) -> None:
    files = read_artefact(folder, "artefact")
    assert {name: files.config[name] for name in CONFIG} == CONFIG
    assert not {"files", "sedac_format_version"} & files.config.keys()
    assert files.certificate == {"epsilon": 0.01}
    assert files.card == {"results": {}}
    expected = tensors()
    assert files.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert files.tensors[name].dtype == value.dtype
        assert torch.equal(files.tensors[name], value)


def test_metadata_says_format_version_and_base(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["sedac_format_version"] == "1"
    assert metadata["base_model_name_or_path"] == "org/base"
    assert metadata["base_model_revision"] == "0" * 40


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CERTIFICATE_FILE])
def test_every_flipped_byte_is_found(folder: Path, name: str) -> None:
    path = folder / name
    original = path.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=name):
            read_artefact(folder, "artefact")
    path.write_bytes(original)
    read_artefact(folder, "artefact")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_found_and_named(folder: Path, size: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtefactError, match=rf"{WEIGHTS_FILE} is damaged: expected \d+ bytes"):
        read_artefact(folder, "artefact")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, CERTIFICATE_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} is missing"):
        read_artefact(folder, "artefact")


@pytest.mark.parametrize("version", [None, 0, 2, "1.0", "new"])
def test_an_unknown_format_version_is_refused(folder: Path, version: Any) -> None:
    edit_config(folder, sedac_format_version=version)
    with pytest.raises(FormatVersionError, match="reads version 1"):
        read_artefact(folder, "artefact")


def test_the_version_inside_the_weights_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefact_format, "FORMAT_VERSION", 2)
    write_artefact(tmp_path, CONFIG, tensors(), None)
    monkeypatch.undo()
    edit_config(tmp_path, sedac_format_version=1)
    with pytest.raises(FormatVersionError, match=WEIGHTS_FILE):
        read_artefact(tmp_path, "artefact")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01"])
def test_a_config_that_is_no_json_object_is_named(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(ArtefactError, match=CONFIG_FILE):
        read_artefact(folder, "artefact")


def test_checksums_cannot_be_left_out(folder: Path) -> None:
    edit_config(folder, files={})
    with pytest.raises(ArtefactError, match="no checksum"):
        read_artefact(folder, "artefact")


def test_a_config_of_other_checkpoints_is_refused(folder: Path) -> None:
    edit_config(folder, checkpoints=[{"layer_idx": 2}])
    with pytest.raises(ArtefactError, match="other checkpoints"):
        read_artefact(folder, "artefact")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["cascade.threshold", "heads.0.weight"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    damaged = tensors()
    damaged[name].flatten()[-1] = value
    write_artefact(tmp_path, CONFIG, damaged, None)
    with pytest.raises(ArtefactError, match=f"{name}' holds NaN or infinity"):
        read_artefact(tmp_path, "artefact")


def test_a_certificate_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    changed = tensors() | {"cascade.threshold": torch.tensor([0.6])}
    write_artefact(other, CONFIG, changed, {"epsilon": 0.01})
    old = json.loads((folder / CONFIG_FILE).read_text())["files"]
    new = json.loads((other / CONFIG_FILE).read_text())["files"]
    assert old[CERTIFICATE_FILE]["sha256"] == new[CERTIFICATE_FILE]["sha256"]
    edit_config(other, files={**new, CERTIFICATE_FILE: old[CERTIFICATE_FILE]})
    with pytest.raises(ArtefactError, match="issued for other weights or thresholds"):
        read_artefact(other, "artefact")


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"
    )
    with pytest.raises(ArtefactError, match="git lfs pull"):
        read_artefact(folder, "artefact")


def test_the_digest_sees_names_types_shapes_and_values_but_not_order() -> None:
    base = tensors()
    digest = tensors_digest(base)
    assert tensors_digest(dict(reversed(base.items()))) == digest
    weight = base["probes.0.weight"]
    changes = {
        "value": base | {"probes.0.weight": weight + 1},
        "shape": base | {"probes.0.weight": weight.T.contiguous()},
        "name": {f"x{name}": value for name, value in base.items()},
        "type": base | {"probes.0.weight": weight.view(torch.int32)},
    }
    assert len({digest, *(tensors_digest(changed) for changed in changes.values())}) == 5


# -- atomic writing ------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_and_fail(target: Path) -> None:
    with atomic_directory(target) as fresh:
        (fresh / CONFIG_FILE).write_text("{}")
        raise RuntimeError("disk full")


def test_an_error_while_writing_leaves_the_old_artefact(folder: Path) -> None:
    before = snapshot(folder)
    with pytest.raises(RuntimeError, match="disk full"):
        write_and_fail(folder)
    assert snapshot(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_while_writing_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk full"):
        write_and_fail(tmp_path / "a" / "b")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_killed_process_leaves_the_old_artefact(folder: Path) -> None:
    before = snapshot(folder)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sedac_hf.artefact_format import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as fresh:\n"
        "    (fresh / 'config.json').write_text('{')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert snapshot(folder) == before
    read_artefact(folder, "artefact")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_exchange_that_fails_is_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    rename, calls = os.rename, 0

    def failing_rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError("busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(ArtefactError, match="cannot be replaced"), atomic_directory(folder) as new:
        (new / CONFIG_FILE).write_text("{}")
    assert snapshot(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_other_files_stay_and_stale_ones_of_ours_go(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "run.txt").write_text("step 1")
    with atomic_directory(folder) as fresh:
        write_artefact(fresh, CONFIG, tensors(), None)
    assert sorted(snapshot(folder)) == ["config.json", "logs/run.txt", "notes.txt", WEIGHTS_FILE]
    assert read_artefact(folder, "artefact").certificate is None


def test_a_link_to_a_folder_stays_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    with atomic_directory(link) as fresh:
        write_artefact(fresh, CONFIG, tensors(), None)
    assert link.is_symlink()
    assert read_artefact(folder, "artefact").certificate is None


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(ArtefactError, match="is a file"), atomic_directory(path):
        pytest.fail("the block must not run")
    assert path.read_text() == "x"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ArtefactError, match="no folder can be made beside it"),
        atomic_directory(tmp_path / "file" / "artefact"),
    ):
        pytest.fail("the block must not run")


def test_what_is_written_has_ordinary_permissions(folder: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    (ordinary / "file").write_text("x")
    assert folder.stat().st_mode == ordinary.stat().st_mode
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, (ordinary / "file").stat().st_mode)
