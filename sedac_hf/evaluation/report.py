"""The result of an evaluation as one JSON object, and on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_hf.calibration.costs import CostModel
from sedac_hf.errors import SedacError
from sedac_hf.evaluation.environment import machine, software_versions
from sedac_hf.files import write_atomically

if TYPE_CHECKING:
    from sedac_hf.evaluation.benchmark import SpeedResult
    from sedac_hf.evaluation.perplexity import PerplexityResult
    from sedac_hf.modeling import SedacForCausalLM

__all__ = [
    "REPORT_VERSION",
    "build_report",
    "head_share",
    "load_report",
    "model_settings",
    "plain_values",
    "save_report",
]

REPORT_VERSION = 1


def build_report(
    model: SedacForCausalLM, mode: str, quality: PerplexityResult, speed: SpeedResult | None
) -> dict[str, Any]:
    """Put quality, speed, certificate and conditions together.

    Args:
        model: The model that was measured.
        mode: Mode it was measured in.
        quality: Perplexities and exits.
        speed: Speed ratios; None when speed was not measured.

    Returns:
        Plain JSON values. Numbers that are not finite are None; without a speed measurement
        `speed_vs_generate`, `speed_vs_plain` and `speed` are None.
    """
    report = asdict(quality)
    costs = _costs(model)
    report |= {
        "report_version": REPORT_VERSION,
        "mode": mode,
        "speed_vs_generate": speed.ratios["generate"].median if speed else None,
        "speed_vs_plain": speed.ratios["plain"].median if speed else None,
        "head_share": costs.head,
        "costs": costs.to_dict(),
        "speed": speed.to_dict() if speed else None,
        "certificate": model.certificate.to_dict() if model.certificate else None,
        "config": model_settings(model),
        "versions": software_versions(),
        "machine": machine(),
        "seeds": {"bootstrap": quality.seed} | ({"speed": speed.seed} if speed else {}),
    }
    plain: dict[str, Any] = plain_values(report)
    return plain


def head_share(model: SedacForCausalLM) -> float:
    """Share of a full pass that is in the output head, by the weights that a token reads.

    Args:
        model: The wrapped model.
    """
    return _costs(model).head


def _costs(model: SedacForCausalLM) -> CostModel:
    draft = model.draft_vocabulary
    return CostModel.from_base(
        model.base_lm,
        model.config.checkpoint_specs(),
        probe_rank=model.config.probe_rank,
        draft_vocabulary=0 if draft is None else len(draft),
    )


def save_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a report to a file, whole or not at all.

    Args:
        report: What `build_report` gave.
        path: The file; a folder gets `results.json` in it.
    """
    where = Path(path)
    if where.is_dir():
        where = where / "results.json"
    text = json.dumps(plain_values(report), indent=2, allow_nan=False)
    write_atomically(where, text + "\n")


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a report.

    Args:
        path: The file, or the folder that holds `results.json`.

    Returns:
        The report.

    Raises:
        SedacError: If it is not a report of this format.
    """
    where = Path(path)
    if where.is_dir():
        where = where / "results.json"
    try:
        report = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SedacError(f"{where} cannot be read as a report: {error}") from error
    found = report.get("report_version") if isinstance(report, dict) else None
    if found != REPORT_VERSION:
        raise SedacError(
            f"{where} has report version {found!r}, this sedac_hf reads {REPORT_VERSION}; "
            "evaluate again, or upgrade sedac_hf."
        )
    return dict(report)


def model_settings(model: SedacForCausalLM) -> dict[str, Any]:
    """What of the configuration a reader needs to repeat a result.

    Args:
        model: The wrapped model.
    """
    config = model.config
    return {
        "base": config.base_model_name_or_path,
        "base_revision": config.base_model_revision,
        "fingerprint": config.fingerprint,
        "checkpoints": [spec.to_dict() for spec in config.checkpoint_specs()],
        "thresholds": _thresholds(model),
        "strategy": config.strategy,
        "kv_mode": config.kv_mode,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _thresholds(model: SedacForCausalLM) -> list[dict[str, Any]]:
    return [asdict(layer) for layer in model.cascade.layers] if model.cascade else []


def plain_values(value: Any) -> Any:
    """Plain JSON values: tuples become lists, numbers that are not finite None.

    Args:
        value: Nested values.
    """
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
