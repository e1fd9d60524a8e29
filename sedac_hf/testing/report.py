"""The results of a suite as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from sedac_hf.testing.outcome import verdict

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sedac_hf.testing.outcome import SuiteResults, TestOutcome

__all__ = ["print_results", "result_tables"]

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def result_tables(results: SuiteResults) -> Iterator[RenderableType]:
    """The verdicts, the figures behind them, and what to know about them.

    Args:
        results: What the suite found.

    Yields:
        Tables and lines for a rich console.
    """
    table = Table(box=box.SIMPLE_HEAD, title=_title(results), title_justify="left")
    for name in ("test", "verdict", "has to hold", "found", "time"):
        table.add_column(name, justify="right" if name == "time" else "left")
    for one in results:
        said = Text(verdict(one), style=_STYLES[verdict(one)])
        cells = (Text(one.name), said, Text(one.criterion), Text(one.found))
        table.add_row(*cells, f"{one.seconds:.0f} s")
    yield table
    if any(one.details() for one in results):
        yield _details(results)
    for one in results:
        for note in one.notes:
            yield Text(f"{one.name}: {note}", style="yellow")


def _title(results: SuiteResults) -> str:
    domains = ", ".join(f"{name} ({count})" for name, count in results.domains.items())
    return f"{results.mode} mode; documents: {domains}"


def _details(results: SuiteResults) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "figure", "value"):
        table.add_column(name)
    for one in results:
        for at, (name, value) in enumerate(one.details()):
            table.add_row(Text(one.name if at == 0 else ""), Text(name), Text(value))
    return table


def print_results(results: SuiteResults, console: Console) -> None:
    """Print the report.

    Args:
        results: What the suite found.
        console: Where to.
    """
    for part in result_tables(results):
        console.print(part)
    console.print(closing_line(results.outcomes, results.passed))


def closing_line(outcomes: tuple[TestOutcome, ...], passed: bool) -> Text:
    """How many tests passed, failed and were skipped."""
    said = [verdict(one) for one in outcomes]
    counts = ", ".join(f"{said.count(name)} {name}" for name in _STYLES if name in said)
    return Text(counts, style="green" if passed else "red")
