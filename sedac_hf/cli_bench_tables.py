"""The rows of a benchmark as tables for people: speed, and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["speed_table", "token_table"]

_CELL = ("group", "batch", "mode")
_RIVALS = {
    "vs_modules": "vs base's\nmodules",
    "vs_assistant_early_exit": "vs early\nexit",
    "vs_prompt_lookup": "vs prompt\nlookup",
    "vs_llama_cpp": "vs\nllama.cpp",
}

Rows = Sequence[Mapping[str, Any]]


def speed_table(rows: Rows) -> Table:
    """How many times faster each mode is; loop gain and exit gain apart.

    Args:
        rows: Rows as `build_row` gives them.
    """
    # Rivals that were never timed get no column.
    timed = [name for name in _RIVALS if any(row[name] is not None for row in rows)]
    table = _table("sedac bench: times as fast")
    for label in ("vs\ngenerate()", "loop\ngain", "exit\ngain", *(_RIVALS[n] for n in timed)):
        table.add_column(label, justify="right")
    for row in _by_cell(table, rows):
        ours = row["mode"] not in ("off", "llama_cpp")
        table.add_row(
            *_names(row),
            _ratio(row, "vs_generate"),
            # Its interval stands in the row of plain, whose ratio to generate() it is.
            f"{row['loop_gain']:.2f}" if ours else "-",
            _ratio(row, "vs_plain") if ours and not row["mode"].startswith("plain") else "-",
            *(_ratio(row, name) for name in timed),
        )
    return table


def token_table(rows: Rows) -> Table:
    """Drafts that were accepted, and how the tokens compare with the base's.

    Args:
        rows: Rows as `build_row` gives them.
    """
    table = _table("tokens")
    labels = (
        "texts",
        "drafts\ntaken",
        "tokens\na pass",
        "left\nearly",
        "as\nbase",
        "rows\ndiffer",
        "logit\ngap",
        "gap in\nunits",
    )
    for label in labels:
        table.add_column(label, justify="right", no_wrap=True)
    for row in _by_cell(table, rows):
        table.add_row(
            *_names(row),
            str(row["prompts"]),
            _number(row["acceptance"], ".0%"),
            _number(row["tokens_per_tail_pass"], ".2f"),
            _number(row["exit_share"], ".0%"),
            _equal(row),
            _number(row["divergences"], "d"),
            _number(row["divergence_gap"], ".3g"),
            _units(row["divergence_units"]),
        )
    return table


def _table(title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    for name in _CELL:
        table.add_column(name, justify="right" if name == "batch" else "left", no_wrap=True)
    return table


def _by_cell(table: Table, rows: Rows) -> Any:
    """The rows, with a line between groups and batch sizes."""
    before = None
    for row in rows:
        cell = (row["group"], row["batch"])
        if before not in (None, cell):
            table.add_section()
        before = cell
        yield row


def _names(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["group"], str(row["batch"]), row["mode"].replace("_", ".")


def _ratio(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    interval = row[f"{name}_ci95"]
    ends = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{row[name]:.2f}{ends}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _units(value: float | None) -> str:
    """A few units are rounding; how many thousands they are says nothing more."""
    return ">999" if value is not None and value > 999 else _number(value, ".3g")


def _equal(row: Mapping[str, Any]) -> str:
    if row["token_equal"] is None:
        return "-"
    same = row["token_checked"] - row["token_differing"]
    return f"{same}/{row['token_checked']}"
