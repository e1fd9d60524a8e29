"""What `sedac eval --strategies` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from sedac_hf.calibration.channels import channel_order
from sedac_hf.cli_load import Loaded, conditions_line, load, seed_everything
from sedac_hf.cli_support import Screen, UsageError, check_report_file
from sedac_hf.cli_texts import documents_for
from sedac_hf.evaluation.environment import machine, software_versions
from sedac_hf.evaluation.report import head_share, save_report
from sedac_hf.evaluation.strategies import operating_points, strategy_curves

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.cli_run import Timing

__all__ = ["curve_table", "measure_strategies", "run_strategies"]

# Documents for thresholds, and for the order of channels where the artefact has none: one in four,
# at most so many.
_CALIBRATION_SHARE, _MOST_CALIBRATION = 4, 32


def run_strategies(
    name: str,
    *,
    base: str | None,
    data: str | None,
    documents: int,
    timing: Timing | None,
    output: Path | None,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model and measure its strategies; see `sedac eval --help`."""
    check_report_file(output)
    loaded = load(name, base=base, mode=None, device=device, dtype=dtype, screen=screen)
    if not loaded.model.config.checkpoints:
        raise UsageError(
            f"{loaded.name} is a plain base without exits, so there is nothing to compare. Fit "
            f"some: sedac fit {loaded.name} -o OUT."
        )
    seed_everything(seed)
    apart = min(max(documents // _CALIBRATION_SHARE, 1), _MOST_CALIBRATION)
    texts, origin = documents_for(loaded, data, documents + apart, seed=seed, screen=screen)
    if len(texts) < 2:
        raise UsageError("two documents are needed at least: one for thresholds, one to measure.")
    apart = min(apart, len(texts) // 2)
    report = measure_strategies(
        loaded, texts[apart:], texts[:apart], timing, seed=seed, screen=screen
    )
    report |= {"texts": origin, "conditions": conditions_line(loaded)}
    if output is not None:
        save_report(report, output)
        screen.note(f"report written to {output}")
    screen.out.print(curve_table(report))
    screen.out.print(
        f"Conditions: {report['conditions']}; {origin}; thresholds aimed on {apart} documents of "
        "their own. Only the deepest checkpoint acts, but for the model's own rules. Speed: greedy "
        "generate() calls against our own loop without exits, medians of paired ratios with 95 % "
        "intervals.",
        style="dim",
    )
    return report


def measure_strategies(
    loaded: Loaded,
    documents: Sequence[Document],
    calibration: Sequence[Document],
    timing: Timing | None,
    *,
    seed: int,
    screen: Screen,
) -> dict[str, Any]:
    """The curves of every strategy.

    Args:
        loaded: The model; it is given an order of channels if it has none.
        documents: Documents to measure on.
        calibration: Others, for thresholds and the order of channels.
        timing: How to time; None leaves speed out.
        seed: Seed of the bootstraps.
        screen: For progress.

    Returns:
        The report as plain JSON values.
    """
    model = loaded.model
    measured = model.channel_order is None
    if measured:
        screen.note(
            f"the artefact has no order of channels: measured on {len(calibration)} of the texts."
        )
        model.set_channel_order(channel_order(model.base, calibration))
    points = operating_points(model, calibration)
    timed: dict[str, Any] = {"speed": False}
    if timing is not None:
        timed = {
            "max_new_tokens": timing.max_new_tokens,
            "rounds": timing.rounds,
            "max_prompts": timing.prompts,
        }
    with screen.status("strategies"):
        curves = strategy_curves(model, documents, points, seed=seed, told=screen.note, **timed)
    return {
        "report_version": 1,
        "kind": "strategies",
        **curves,
        "channel_order": "measured for this" if measured else "the artefact's own",
        "calibration_documents": len(calibration),
        "head_share": head_share(model),
        "versions": software_versions(),
        "machine": machine(),
    }


def curve_table(report: Mapping[str, Any]) -> Table:
    """One line for each operating point."""
    title = f"strategies: {report['documents']} documents, {report['tokens']} tokens"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    columns = ("exits", "layers", "MLP channels", "rise of perplexity [95 %]", "speed vs plain")
    table.add_column("", justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in report["points"]:
        low, high = row["ppl_increase_ci95"]
        rise = " ".join((_percent(row["ppl_increase"]), f"[{_percent(low)}, {_percent(high)}]"))
        ratio = row["speed_vs_plain"]
        speed = "-"
        if ratio is not None:
            low, high = ratio["interval"]
            speed = f"{ratio['median']:.2f}x [{low:.2f}, {high:.2f}]"
        table.add_row(
            row["name"],
            f"{row['exit_share']:.1%}",
            f"{row['mean_depth']:.1f}/{report['depth']}",
            f"{row['mean_kept_share']:.1%}",
            rise,
            speed,
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2%}"
