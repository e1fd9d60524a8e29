"""Progress of long work: a bar on a terminal, a line now and then where it goes to a file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ["progress_bar", "say"]

_EVERY = 60.0  # seconds between two lines


class _Lines:
    """A stream that is given each state of a bar as a line of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, desc: str, unit: str, *, initial: int = 0, shown: bool = True) -> Any:
    """A bar of tqdm on standard error.

    Args:
        total: Units of all the work.
        desc: What is being done.
        unit: Name of a unit.
        initial: Units that are done already.
        shown: Whether to show it at all.

    Returns:
        The bar.
    """
    how: dict[str, Any] = {}
    # In a notebook standard error is no terminal either, but bars are widgets there.
    in_notebook = any(each.__module__ == "tqdm.notebook" for each in tqdm.__mro__)
    if not in_notebook and not sys.stderr.isatty():
        how = dict.fromkeys(("mininterval", "maxinterval"), _EVERY)
        how |= {"file": _Lines(sys.stderr), "ncols": 80}
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not shown, **how)


def say(text: str) -> None:
    """Write a line to standard error, above the bars that are there.

    Args:
        text: The line.
    """
    tqdm.write(text, file=sys.stderr)
