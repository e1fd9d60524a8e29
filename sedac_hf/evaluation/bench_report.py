"""What a benchmark found, with its conditions, as one JSON object and in a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sedac_hf.evaluation.bench import BenchResult
from sedac_hf.evaluation.bench_plan import BenchPlan
from sedac_hf.evaluation.environment import machine, software_versions
from sedac_hf.evaluation.report import model_settings, plain_values
from sedac_hf.evaluation.rivals import LOOKUP_TOKENS
from sedac_hf.files import write_atomically

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["bench_report", "save_bench"]


def bench_report(
    model: SedacForCausalLM, name: str, plan: BenchPlan, result: BenchResult
) -> dict[str, Any]:
    """Put rows and conditions together.

    Args:
        model: What was measured.
        name: What the model is called.
        plan: What was asked for.
        result: What was found.

    Returns:
        `{"conditions": ..., "rows": [...]}` in plain JSON values.
    """
    settings = model_settings(model)
    conditions = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": name,
        "dtype": settings["dtype"],
        "device": settings["device"],
        "threads": torch.get_num_threads(),
        "decoding": "greedy, every call writes exactly the tokens that were asked for",
        "plan": asdict(plan),
        "seconds": result.seconds,
        "left_out": result.left_out,
        "assistant_early_exit": result.early_exit.to_dict() if result.early_exit else None,
        "prompt_lookup_num_tokens": LOOKUP_TOKENS,
        "commit": result.commit,
        "versions": software_versions(),
        "machine": machine(),
        "config": settings,
    }
    values: dict[str, Any] = plain_values({"conditions": conditions, "rows": result.rows})
    return values


def save_bench(report: Mapping[str, Any], folder: Path) -> Path:
    """Keep a report under its date, model and data type, whole or not at all.

    Args:
        report: What `bench_report` gave.
        folder: Where; it is made when missing.

    Returns:
        The file.
    """
    found = report["conditions"]
    date = re.sub(r"[^0-9T]", "", found["date"].split("+")[0])
    model = re.sub(r"[^\w.-]+", "-", Path(found["model"]).name)
    path = folder / f"{date}-{model}-{found['dtype']}.json"
    write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return path
