"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

__all__ = ["evaluation_table", "fit_table", "info_table"]


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """Perplexity, exits and speed of one report, in one table."""
    speed: Mapping[str, Any] = report.get("speed") or {}
    per_second: Mapping[str, float] = speed.get("tokens_per_second") or {}
    depth = int(report["depth"])
    title = f"SEDAC, {report['mode']} mode"
    if report["mode"] == "certified" and not report["certified"]:
        title += " (not certified)" if report["exit_share"] else " (exits off)"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("", "base", "plain", "SEDAC"):
        table.add_column(name, justify="right" if name else "left")
    low, high = report["ppl_increase_ci95"]
    table.add_row(
        f"perplexity ({report['documents']} documents, {report['tokens']} tokens)",
        _number(report["base_ppl"], ".3f"),
        "",
        _number(report["sedac_ppl"], ".3f"),
    )
    table.add_row(
        "rise of perplexity [95 % interval]",
        "",
        "",
        f"{_percent(report['ppl_increase'])} [{_percent(low)}, {_percent(high)}]",
    )
    table.add_row("layers per token", str(depth), str(depth), _number(report["mean_depth"], ".1f"))
    table.add_row("tokens that left early", "", "", _number(report["exit_share"], ".1%"))
    for layer, count in report["exits_by_layer"].items():
        where = "the embedding" if int(layer) < 0 else f"layer {layer}"
        table.add_row(f"  after {where}", "", "", str(count))
    if report.get("soft_exit_share"):
        table.add_row("tokens on fewer channels", "", "", _number(report["soft_exit_share"], ".1%"))
        kept = _number(report["mean_kept_share"], ".1%")
        table.add_row("channels of the MLPs that are run", "100.0%", "100.0%", kept)
    if speed:
        rates = [_number(per_second.get(name), ".1f") for name in ("generate", "plain", "sedac")]
        table.add_row("tokens per second", *rates)
        for other, label in (("generate", "base.generate()"), ("plain", "plain")):
            table.add_row(f"speed against {label}", "", "", _ratio(speed["ratios"].get(other)))
    table.add_row(
        "share of a full pass in the output head", "", "", _number(report["head_share"], ".1%")
    )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2%}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if not ratio:
        return "-"
    low, high = ratio["interval"]
    return f"{ratio['median']:.2f}x [{low:.2f}, {high:.2f}]"


def fit_table(report: Mapping[str, Any]) -> Table:
    """What `fit` measured of each exit head, and of the gates before it."""
    gates: dict[tuple[int, str], float] = {
        (gate["layer_idx"], gate["gate"]): gate["auroc"] for gate in report["gates"]
    }
    kinds = sorted({kind for _, kind in gates})
    table = Table(box=box.SIMPLE_HEAD, title="exit heads", title_justify="left")
    columns = ("after layer", "feedback", "steps", "tokens", "minutes", "agreement", "2nd step")
    for name in (*columns, *(f"AUROC {kind}" for kind in kinds)):
        table.add_column(name, justify="right")
    for head in report["heads"]:
        layer = head["layer_idx"]
        table.add_row(
            str(layer),
            _cell(head["feedback"]),
            f"{head['steps']:,}",
            f"{head['tokens']:,}",
            f"{head['seconds'] / 60:.1f}",
            _number(head["agreement"], ".3f"),
            _number(head["stand_in_agreement"], ".3f"),
            *(_number(gates.get((layer, kind)), ".3f") for kind in kinds),
        )
    return table


def info_table(values: Mapping[str, Any]) -> Table:
    """Nested values as a table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, Mapping):
            table.add_row(Text(name), Text(_cell(value)))
        elif isinstance(value, (list, tuple)):
            for at, item in enumerate(value):
                table.add_row(Text(name if at == 0 else ""), Text(_cell(item)))
        else:
            table.add_row(Text(name), Text(_cell(value)))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(entry)}" for name, entry in value.items())
    return str(value)
