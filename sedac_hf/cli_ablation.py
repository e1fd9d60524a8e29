"""What `sedac eval --ablation` does: every variant of an artefact's gates in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sedac_hf.cli_load import conditions_line, load, seed_everything
from sedac_hf.cli_run import Timing
from sedac_hf.cli_support import Screen, UsageError, check_report_file
from sedac_hf.cli_texts import documents_for
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.ablation import AblationRow, fitted_variants, measure_ablation
from sedac_hf.evaluation.report import plain_values
from sedac_hf.files import write_atomically

__all__ = ["ablation_table", "run_ablation"]


def run_ablation(
    name: str,
    timing: Timing | None,
    *,
    base: str | None,
    data: str | None,
    documents: int,
    output: Path | None,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load an artefact and measure its variants; see `sedac eval --help`.

    Args:
        name: Folder or Hub name of the artefact.
        timing: How to time; None leaves speed out.
        base: The base, in place of the artefact's own.
        data: Texts to measure on; None for those of the artefact's kind.
        documents: How many of them.
        output: File to write the rows to.
        seed: Seed of every draw.
        device: Device to run on.
        dtype: Data type to run in.
        screen: Where to print.

    Returns:
        The rows and their conditions as plain JSON values.

    Raises:
        UsageError: If the artefact says nothing of variants.
    """
    check_report_file(output)
    loaded = load(name, base=base, mode="certified", device=device, dtype=dtype, screen=screen)
    try:
        variants = fitted_variants(loaded.model)
    except CalibrationError as error:
        raise UsageError(f"{name}: {error}") from error
    seed_everything(seed)
    texts, origin = documents_for(loaded, data, documents, seed=seed, screen=screen)
    prompts = [d.ids[: max(1, d.prompt_length)].tolist() for d in texts]
    options: dict[str, Any] = {}
    if timing is not None:
        options = {
            "prompts": prompts,
            "max_new_tokens": timing.max_new_tokens,
            "rounds": timing.rounds,
            "max_prompts": timing.prompts,
        }
    with screen.status(f"{len(variants)} variants on {len(texts)} documents"):
        rows = measure_ablation(loaded.model, variants, texts, seed=seed, **options)
    report: dict[str, Any] = plain_values(
        {
            "model": name,
            "documents": len(texts),
            "depth": loaded.model.exit_stats.depth,
            "rows": [row.to_dict() for row in rows],
            "texts": origin,
            "conditions": conditions_line(loaded),
        }
    )
    if output is not None:
        write_atomically(output, json.dumps(report, indent=2, allow_nan=False) + "\n")
        screen.note(f"rows written to {output}")
    screen.out.print(ablation_table(rows, loaded.model.exit_stats.depth))
    screen.out.print(
        f"Conditions: {report['conditions']}; {origin}. Each variant has the policy that fit found "
        "for it at the target; time is against plain, our own loop without exits, in the same run. "
        "* is what fit chose.",
        style="dim",
    )
    return report


def ablation_table(rows: Sequence[AblationRow], depth: int) -> Table:
    """The rows as a table.

    Args:
        rows: What was measured.
        depth: Layers of the base.
    """
    table = Table(box=box.SIMPLE_HEAD, title="variants of the gates", title_justify="left")
    for column in ("", "left early", f"layers of {depth}", "rise of perplexity", "against plain"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        low, high = (_percent(end) for end in row.ppl_increase_ci95)
        speed = "-"
        if row.speed_vs_plain is not None:
            slow, fast = row.speed_vs_plain.interval
            speed = f"{row.speed_vs_plain.median:.2f}x [{slow:.2f}, {fast:.2f}]"
        table.add_row(
            f"{row.name}{' *' if row.chosen else ''}",
            f"{row.exit_share:.1%}",
            f"{row.mean_depth:.1f}",
            f"{_percent(row.ppl_increase)} [{low}, {high}]",
            speed,
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2%}"
