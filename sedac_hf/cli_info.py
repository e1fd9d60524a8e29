"""What `sedac info` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sedac_hf.artefact_format import WEIGHTS_FILE, read_artefact
from sedac_hf.base_resolution import HubOptions, fetch_artefact, find_base
from sedac_hf.calibration.certificate import Certificate
from sedac_hf.cli_load import pick_device, pick_dtype, read_model_config
from sedac_hf.cli_pass import pass_info
from sedac_hf.cli_support import BUNDLED, REPOSITORY, Screen
from sedac_hf.errors import BaseNotFoundError
from sedac_hf.evaluation.environment import machine, software_versions

__all__ = ["artefact_info", "environment_info"]


def environment_info() -> dict[str, Any]:
    """Versions, device, and whether the reference model and its artefact are in place."""
    device = pick_device("auto")
    dtype, reason = pick_dtype("auto", device, [])
    model = REPOSITORY / ".models" / "smollm2-135m-instruct"
    return {
        "versions": software_versions(),
        "machine": machine(),
        "device": str(device),
        "dtype": f"{dtype} ({reason})",
        "reference_model": str(model) if (model / "config.json").is_file() else None,
        "bundled_artefact": str(BUNDLED) if (BUNDLED / WEIGHTS_FILE).is_file() else None,
    }


def artefact_info(name: str, screen: Screen) -> dict[str, Any]:
    """What an artefact holds; of a plain base, what it is; and what runs it here.

    Args:
        name: Folder or Hub name.
        screen: For progress: a base that is at hand is loaded.

    Returns:
        Base, checkpoints, sizes and certificate as plain JSON values.

    Raises:
        UsageError: If there is nothing under that name.
        ArtefactError: If the artefact is damaged.
    """
    config = read_model_config(name)
    if config.get("model_type") != "sedac":
        return {
            "model": name,
            "kind": "plain base, without exits",
            "model_type": config.get("model_type"),
            "layers": config.get("num_hidden_layers"),
            "dtype": config.get("dtype") or config.get("torch_dtype"),
            **_runs_on(name, name, screen),
            "next": f"sedac fit {name} -o OUT",
        }
    folder = fetch_artefact(name, HubOptions())
    files = read_artefact(folder, source=name)
    values = files.config
    certificate = Certificate.from_dict(files.certificate) if files.certificate else None
    place = _base_place(values, folder)
    return {
        "model": name,
        "kind": "artefact",
        "base": values.get("base_model_name_or_path"),
        "base_revision": values.get("base_model_revision"),
        "base_found": place,
        **_runs_on(name, place, screen),
        "mode": values.get("mode"),
        "checkpoints": [_checkpoint(point) for point in values.get("checkpoints") or []],
        "parameters": sum(t.numel() for t in files.tensors.values() if t.is_floating_point()),
        "megabytes": round((folder / WEIGHTS_FILE).stat().st_size / 1e6, 2),
        "certified_dtypes": values.get("certified_dtypes"),
        "certificate": certificate.statement() if certificate else None,
    }


def _runs_on(name: str, base: str | None, screen: Screen) -> dict[str, Any]:
    """What runs a model; asked only where its base lies in a folder, for it must be loaded."""
    if base is None or not Path(base).is_dir():
        return {"runs_on": None, "runs_on_reason": "the base is not at hand, so it was not asked"}
    return pass_info(name, screen)


def _checkpoint(point: dict[str, Any]) -> dict[str, Any]:
    """What sets a checkpoint apart, without the fields that are of no account for its head."""
    kept = {"lens": ("lens_rank",), "block": ("num_layers", "feedback", "storage")}
    names = ("layer_idx", "head", *kept.get(str(point.get("head")), ()))
    found = {name: point[name] for name in names if name in point}
    if point.get("delta_rank"):
        found["delta_rank"] = point["delta_rank"]
    return found


def _base_place(values: dict[str, Any], folder: Path) -> str | None:
    name = values.get("base_model_name_or_path")
    if not name:
        return None
    try:
        return find_base(name, values.get("base_model_revision"), folder)
    except BaseNotFoundError:
        return None
