"""A metric for the `evaluate` library that loads from the installed package, without a network."""

from __future__ import annotations

from pathlib import Path

__all__ = ["metric_path"]


def metric_path() -> str:
    """Folder of the metric, for `evaluate.load(metric_path())`.

    Returns:
        An absolute path.
    """
    return str(Path(__file__).resolve().parent / "sedac_perplexity")
