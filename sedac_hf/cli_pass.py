"""What `sedac bench --pass` does, and what `sedac info` says of passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from sedac_hf.cli_load import Loaded, load
from sedac_hf.cli_run import encode_prompt
from sedac_hf.cli_support import Screen
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.native_model import NativeModel
from sedac_hf.errors import SedacError
from sedac_hf.evaluation.core_share import measure_core_share
from sedac_hf.evaluation.pass_bench import PassTiming, time_passes
from sedac_hf.evaluation.prompts import load_prompts

__all__ = ["pass_info", "run_pass_bench"]


def run_pass_bench(
    name: str, *, base: str | None, rounds: int, device: str, dtype: str, screen: Screen
) -> dict[str, Any]:
    """Load a model and time passes of its base; see `sedac bench --help`.

    Args:
        name: Artefact or base.
        base: Where the base is, if not where the artefact says.
        rounds: Rounds, of which the fastest counts.
        device: Torch device or `auto`.
        dtype: Data type or `auto`.
        screen: Where the table goes.

    Returns:
        Conditions and timings as plain JSON values.
    """
    loaded = load(name, base=base, mode="off", device=device, dtype=dtype, screen=screen)
    lm = loaded.model.base_lm
    with screen.status("timing passes"):
        timings = time_passes(lm, rounds=rounds)
    with screen.status("timing steps"):
        shares = measure_core_share(loaded.model, _prompt(loaded))
    found = {
        "model": name,
        "dtype": loaded.dtype,
        "threads": torch.get_num_threads(),
        "kernel": NativeModel(BaseShell(lm)).parts().base.kernel,
        "passes": [asdict(timing) for timing in timings],
        "outside_core": [{**asdict(each), "share": each.outside} for each in shares],
    }
    if not screen.as_json:
        title = f"{name}, {found['dtype']}, {found['threads']} threads, {found['kernel']}"
        screen.out.print(_table(timings, title))
        for each in shares:
            how = ", streamed" if each.streamed else ""
            screen.out.print(
                f"outside the core, {each.mode}{how}: {each.outside:.1%} of a step "
                f"({each.outside_ms:.2f} of {each.step_ms:.1f} ms, {each.steps} steps)"
            )
    return found


def pass_info(name: str, screen: Screen) -> dict[str, Any]:
    """Which pass serves a model here, and why no better one does.

    Args:
        name: Artefact or base; it is loaded, with its base.
        screen: For progress.

    Returns:
        `runs_on` and `runs_on_reason`, as in `exit_stats`.
    """
    try:
        loaded = load(name, base=None, mode=None, device="auto", dtype="auto", screen=screen)
    except (SedacError, OSError) as error:
        return {"runs_on": None, "runs_on_reason": f"it cannot be loaded: {error}"}
    choice = loaded.model.pass_choice()
    return {"runs_on": choice.name, "runs_on_reason": choice.reason or None}


def _prompt(loaded: Loaded) -> list[int]:
    ids: list[int] = encode_prompt(loaded, load_prompts("chat")[0])["input_ids"][0].tolist()
    return ids


def _table(timings: Sequence[PassTiming], title: str) -> Table:
    table = Table(title=title)
    names = "context", "tokens", "native, ms", "of one", "bandwidth", "torch, ms", "torch / native"
    for name in names:
        table.add_column(name, justify="right")
    alone: dict[int, float] = {}
    for timing in timings:
        one = alone.setdefault(timing.context, timing.native_ms)
        torch_ms = timing.torch_ms
        table.add_row(
            f"{timing.context:,}",
            str(timing.nodes),
            f"{timing.native_ms:.2f}",
            f"{timing.native_ms / one:.2f}x",
            f"{timing.bandwidth_share:.0%}",
            "-" if torch_ms is None else f"{torch_ms:.2f}",
            "-" if torch_ms is None else f"{torch_ms / timing.native_ms:.2f}x",
        )
    return table
