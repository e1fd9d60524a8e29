"""The files of an artefact: written all or none, read and checked before any model sees them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sedac_hf.errors import ArtefactError, FormatVersionError

__all__ = [
    "BASE_FOLDER",
    "CARD_FILE",
    "CARD_SOURCE_FILE",
    "CERTIFICATE_FILE",
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "REMOTE_CODE_FILE",
    "RISKS_PREFIX",
    "WEIGHTS_FILE",
    "ArtefactFiles",
    "ArtefactOrigin",
    "atomic_directory",
    "read_artefact",
    "read_json",
    "tensors_digest",
    "write_artefact",
    "write_json",
]

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sedac.safetensors"
CERTIFICATE_FILE = "certificate.json"
CARD_FILE = "README.md"
CARD_SOURCE_FILE = "card.json"
REMOTE_CODE_FILE = "modeling_sedac.py"
BASE_FOLDER = "base"
RISKS_PREFIX = "risks."

# Fields of config.json that describe the files and are no part of SedacConfig.
_FORMAT_FIELDS = ("sedac_format_version", "files", "auto_map", "transformers_version")
# Removed when an artefact is replaced; the rest of the folder is the user's.
_OWN_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CERTIFICATE_FILE,
    CARD_FILE,
    CARD_SOURCE_FILE,
    REMOTE_CODE_FILE,
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class ArtefactFiles:
    """What was read from an artefact and found whole.

    Attributes:
        source: Path or Hub name, for messages.
        directory: Local folder the files were read from.
        config: Fields of `SedacConfig`.
        tensors: Name -> tensor on the CPU.
        certificate: Content of certificate.json, or None.
        card: What the card was made of; empty when that was not kept.
    """

    source: str
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    certificate: dict[str, Any] | None
    card: dict[str, Any]


@dataclass(frozen=True)
class ArtefactOrigin:
    """What a loaded model remembers of its artefact.

    Attributes:
        source: Path or Hub name.
        directory: Local folder the files were read from.
        digest: Digest of the tensors as they were loaded.
        card: What its card was made of.
    """

    source: str
    directory: Path
    digest: str
    card: dict[str, Any]


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a fresh folder beside `target`; it takes the target's place when the block succeeds.

    Files in the target that are none of an artefact's own stay. If the block or the exchange
    fails, the target is as it was.

    Args:
        target: Folder to create or replace.

    Yields:
        The folder to write into.

    Raises:
        ArtefactError: If `target` is a file or cannot be replaced.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise ArtefactError(f"{target} is a file; give a folder to save the artefact in.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtefactError(
            f"{target} cannot be written: no folder can be made beside it ({error}). Save into a "
            "folder whose parent is yours to write."
        ) from error
    try:
        fresh = workspace / "new"
        fresh.mkdir()
        yield fresh
        _exchange(fresh, target, workspace / "old")
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _exchange(fresh: Path, target: Path, old: Path) -> None:
    """Put `fresh` where `target` is, taking along what is not ours; undone if a step fails."""
    moved: list[str] = []
    try:
        if target.exists():
            os.rename(target, old)
            for entry in sorted(old.iterdir()):
                if entry.name not in _OWN_FILES and not (fresh / entry.name).exists():
                    os.rename(entry, fresh / entry.name)
                    moved.append(entry.name)
        os.rename(fresh, target)
    except OSError as error:
        for name in moved:
            os.rename(fresh / name, old / name)
        if old.exists():
            os.rename(old, target)
        raise ArtefactError(
            f"{target} cannot be replaced ({error}). Save into a folder that may be renamed, not "
            "into a mount point, and copy it there."
        ) from error


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, whatever their order.

    Histograms of risks are left out: they decide nothing, and may be added to what is certified.
    So is the order of channels unless exits are soft.
    """
    digest = hashlib.sha256()
    soft = "cascade.steepness" in tensors
    apart = (RISKS_PREFIX,) if soft else (RISKS_PREFIX, "channels.")
    for name in sorted(name for name in tensors if not name.startswith(apart)):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_artefact(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    certificate: Mapping[str, Any] | None,
) -> None:
    """Write config.json, sedac.safetensors and certificate.json into an empty folder.

    Args:
        directory: Folder to write into, see `atomic_directory`.
        config: Fields of `SedacConfig` and what else belongs into config.json.
        tensors: Probes, heads, draft vocabulary and thresholds by name.
        certificate: The certificate as JSON values, or None.
    """
    metadata = {
        "format": "pt",
        "sedac_format_version": str(FORMAT_VERSION),
        "base_model_name_or_path": str(config.get("base_model_name_or_path") or ""),
        "base_model_revision": str(config.get("base_model_revision") or ""),
        "layout": _layout(config),
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(plain, directory / WEIGHTS_FILE, metadata=metadata)
    files = {WEIGHTS_FILE: _describe(directory / WEIGHTS_FILE)}
    if certificate is not None:
        write_json(directory / CERTIFICATE_FILE, certificate)
        # Binds the certificate to the weights and thresholds that it was issued for.
        digest = {"tensors_sha256": tensors_digest(plain)}
        files[CERTIFICATE_FILE] = _describe(directory / CERTIFICATE_FILE) | digest
    write_json(
        directory / CONFIG_FILE,
        {**config, "sedac_format_version": FORMAT_VERSION, "files": files},
    )
    # safetensors makes files that their owner alone may read.
    shutil.copymode(directory / CONFIG_FILE, directory / WEIGHTS_FILE)


def read_artefact(directory: Path, source: str) -> ArtefactFiles:
    """Read an artefact's files and check each of them against what config.json says.

    Args:
        directory: Local folder.
        source: What the user called it, for messages.

    Returns:
        The content; nothing has touched a model.

    Raises:
        FormatVersionError: If it was written in a format this version does not know.
        ArtefactError: If a file is missing, damaged, or does not belong to the others.
    """
    config = read_json(directory / CONFIG_FILE)
    _check_version(config.get("sedac_format_version"), directory / CONFIG_FILE)
    described = config.get("files")
    if not isinstance(described, dict) or WEIGHTS_FILE not in described:
        raise ArtefactError(
            f"{directory / CONFIG_FILE} has no checksum of {WEIGHTS_FILE} under 'files'. Save the "
            "artefact again with save_pretrained."
        )
    for name in (WEIGHTS_FILE, CERTIFICATE_FILE):
        if name in described:
            _check_file(directory / name, described[name])
    tensors = _read_tensors(directory / WEIGHTS_FILE, config)
    certificate = None
    if CERTIFICATE_FILE in described:
        certificate = read_json(directory / CERTIFICATE_FILE)
        if described[CERTIFICATE_FILE].get("tensors_sha256") != tensors_digest(tensors):
            raise ArtefactError(
                f"{directory / CERTIFICATE_FILE} was issued for other weights or thresholds than "
                f"{WEIGHTS_FILE} beside it holds. Certify again."
            )
    card = directory / CARD_SOURCE_FILE
    return ArtefactFiles(
        source=source,
        directory=directory,
        config={key: value for key, value in config.items() if key not in _FORMAT_FIELDS},
        tensors=tensors,
        certificate=certificate,
        card=read_json(card) if card.exists() else {},
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ArtefactError: If the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing; the artefact is incomplete.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is damaged: {error}. Fetch or save it again.") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, keys sorted."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _layout(config: Mapping[str, Any]) -> str:
    """What config.json says about the meaning of the tensors; kept beside them as well."""
    names = ("checkpoints", "probe_rank", "probe_target", "strategy", "kv_mode")
    return json.dumps({name: config.get(name) for name in names}, sort_keys=True)


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def _check_version(found: Any, path: Path) -> None:
    if str(found) != str(FORMAT_VERSION):
        raise FormatVersionError(
            f"{path} says format version {found!r}; this sedac_hf reads version {FORMAT_VERSION}. "
            "Upgrade sedac_hf (pip install -U sedac-hf), or fit the artefact again."
        )


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; the artefact is incomplete.")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ArtefactError(f"{path} is a git LFS pointer; run `git lfs pull` to fetch it.")
    found = _describe(path)
    if found["size"] != expected["size"]:
        raise ArtefactError(
            f"{path} is damaged: expected {expected['size']} bytes, found {found['size']}. "
            "Fetch it again."
        )
    if found["sha256"] != expected["sha256"]:
        raise ArtefactError(
            f"{path} is damaged or was changed: expected SHA-256 {expected['sha256']}, found "
            f"{found['sha256']}. Fetch it again."
        )


def _read_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is damaged: {error}. Fetch it again.") from error
    _check_version(metadata.get("sedac_format_version"), path)
    if metadata.get("layout") != _layout(config):
        raise ArtefactError(
            f"{path} was written for other checkpoints than {CONFIG_FILE} beside it describes: "
            f"{metadata.get('layout')} against {_layout(config)}. Restore the config.json that "
            "belongs to it."
        )
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArtefactError(
                f"{path}: tensor {name!r} holds NaN or infinity. Fit the artefact again."
            )
    return tensors
