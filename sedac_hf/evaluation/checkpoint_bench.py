"""What one checkpoint costs: the fused call into Rust beside the same in torch operations.

Run ``python -m sedac_hf.evaluation.checkpoint_bench``. Both sides read the same states and must
agree before they are timed; they are timed in turns, in many short rounds of which the fastest
counts, so that other work on the machine disturbs the figures as little as can be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sedac_hf import _core
from sedac_hf.core.cascade_controller import CascadeConfig, CascadeController, LayerConfig
from sedac_hf.core.probe_inference import LREProbe
from sedac_hf.errors import SedacError

__all__ = ["Timing", "main", "time_accumulate", "time_checkpoint"]

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_ROUND_SECONDS = 0.002


@dataclass(frozen=True)
class Timing:
    """One comparison.

    Attributes:
        what: What was timed.
        rows: Rows per call.
        dtype: Type of the states.
        rust_us: Microseconds per call of the Rust side, in its fastest round.
        torch_us: The same of the torch side.
        ratio: `torch_us / rust_us`.
    """

    what: str
    rows: int
    dtype: str
    rust_us: float
    torch_us: float
    ratio: float


def time_checkpoint(
    rows: int, dtype: str = "bf16", *, width: int = 576, rank: int = 64, rounds: int = 100
) -> Timing:
    """Time probe, accumulation and decision for some rows.

    Args:
        rows: Rows per call.
        dtype: "f32", "bf16" or "f16".
        width: Width of the states.
        rank: Rank of the probe.
        rounds: Rounds of about 2 ms a side.

    Returns:
        The comparison.

    Raises:
        SedacError: If the two sides disagree.
    """
    torch.manual_seed(0)
    probe = LREProbe(width, rank).requires_grad_(False)
    layer = LayerConfig(0, threshold=1.0, decay=0.9, exit_confidence=0.3)
    controller = CascadeController(CascadeConfig([layer]), [probe.packed()])
    hidden = torch.randn(rows, width).to(_DTYPES[dtype])
    active = np.ones(rows, np.bool_)
    previous, active_tensor = torch.zeros(rows), torch.ones(rows, dtype=torch.bool)

    def in_rust() -> bool:
        return controller.step(0, hidden, controller.start(rows), active).tries > 0

    @torch.inference_mode()
    def in_torch() -> bool:
        trying = _torch_step(probe, layer, hidden, previous, active_tensor)
        return bool(trying.any())

    ours = controller.step(0, hidden, controller.start(rows), active).try_exit
    theirs = _torch_step(probe, layer, hidden, previous, active_tensor).numpy()
    # A confidence within rounding of the bar may fall on either side of it.
    if np.mean(ours != theirs) > 0.05 + 1 / rows:
        raise SedacError("the two sides decide differently: expected the same rows to try.")
    return _compare("checkpoint", rows, dtype, in_rust, in_torch, rounds)


def time_accumulate(rows: int, *, rounds: int = 100) -> Timing:
    """Time the accumulation alone.

    Args:
        rows: Rows per call.
        rounds: Rounds of about 2 ms a side.

    Returns:
        The comparison.

    Raises:
        SedacError: If the two sides disagree.
    """
    previous, risk = torch.rand(2, rows, generator=torch.Generator().manual_seed(0))
    arrays, out = (previous.numpy(), risk.numpy()), np.empty(rows, np.float32)
    result = torch.empty(rows)

    def in_rust() -> None:
        _core.batch_confidence_accumulate(*arrays, 0.7, 1.0, 0.9, out)

    @torch.inference_mode()
    def in_torch() -> None:
        torch.add(0.9 * previous, _torch_confidence(risk, 0.7), alpha=1.0, out=result)

    in_rust()
    in_torch()
    if not np.allclose(out, result.numpy(), atol=1e-6):
        raise SedacError("the two sides accumulate differently: expected the same confidence.")
    return _compare("accumulate", rows, "f32", in_rust, in_torch, rounds)


def _torch_confidence(risk: Tensor, tau: float) -> Tensor:
    scaled = ((tau - risk) / tau).clamp(0, 1)
    return torch.where(torch.isfinite(risk), scaled, 0.0)


def _torch_step(
    probe: LREProbe, layer: LayerConfig, hidden: Tensor, previous: Tensor, active: Tensor
) -> Tensor:
    """The checkpoint in torch operations: which rows try to exit, `[rows]`."""
    risk = probe(hidden)
    gain = layer.weight * _torch_confidence(risk, layer.threshold)
    confidence = layer.decay * previous + gain
    return (confidence / layer.weight >= layer.exit_confidence) & torch.isfinite(risk) & active


def _compare(
    what: str,
    rows: int,
    dtype: str,
    in_rust: Callable[[], object],
    in_torch: Callable[[], object],
    rounds: int,
) -> Timing:
    calls = [max(1, round(_ROUND_SECONDS / _seconds(side, 3))) for side in (in_rust, in_torch)]
    pairs = [(_seconds(in_rust, calls[0]), _seconds(in_torch, calls[1])) for _ in range(rounds)]
    rust, other = (min(side) * 1e6 for side in zip(*pairs, strict=True))
    return Timing(what, rows, dtype, rust, other, other / rust)


def _seconds(call: Callable[[], object], times: int) -> float:
    """Seconds per call over `times` calls."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return max((time.perf_counter() - start) / times, 1e-9)


def _table(timings: Sequence[Timing], width: int, rank: int, threads: int) -> Table:
    title = f"width {width}, rank {rank}, {threads} torch threads, {_core.kernel()}"
    table = Table(title=title)
    for name in ("what", "rows", "states", "Rust, us", "torch, us", "torch / Rust"):
        table.add_column(name, justify="left" if name in {"what", "states"} else "right")
    for timing in timings:
        table.add_row(
            timing.what,
            f"{timing.rows:,}",
            timing.dtype,
            f"{timing.rust_us:,.1f}",
            f"{timing.torch_us:,.1f}",
            f"{timing.ratio:.1f}x",
        )
    return table


def run(
    width: Annotated[int, typer.Option(help="Width of the states.")] = 576,
    rank: Annotated[int, typer.Option(help="Rank of the probe.")] = 64,
    threads: Annotated[int, typer.Option(help="Threads that torch may use.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds of about 2 ms a side.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a checkpoint, and the accumulation alone, in Rust and in torch operations."""
    torch.set_num_threads(threads)
    timings = [
        time_checkpoint(rows, dtype, width=width, rank=rank, rounds=rounds)
        for dtype in _DTYPES
        for rows in (1, 8, 64)
    ]
    timings += [time_accumulate(rows, rounds=rounds) for rows in (1, 64, 4096, 1_000_000)]
    console = Console()
    if as_json:
        console.print_json(json.dumps([asdict(timing) for timing in timings]))
    else:
        console.print(_table(timings, width, rank, threads))


def main() -> None:
    """Run the command line."""
    typer.run(run)


if __name__ == "__main__":
    main()
