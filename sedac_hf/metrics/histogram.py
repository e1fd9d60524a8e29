"""Figures of a histogram that the Rust core has counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sedac_hf._core import HistogramCounts

__all__ = ["mean", "quantile", "size", "spread"]


def size(found: HistogramCounts) -> int:
    """How many finite values it holds."""
    return sum(found["counts"])


def mean(found: HistogramCounts) -> float | None:
    """Their mean, or None without any."""
    count = size(found)
    return found["sum"] / count if count else None


def spread(found: HistogramCounts) -> float | None:
    """Their standard deviation, or None without any."""
    count = size(found)
    if not count:
        return None
    centre = found["sum"] / count
    return math.sqrt(max(found["squares"] / count - centre * centre, 0.0))


def quantile(found: HistogramCounts, bounds: Sequence[float], share: float) -> float | None:
    """A quantile, interpolated between bounds as PromQL's `histogram_quantile` does it.

    Args:
        found: The histogram.
        bounds: Upper bounds of its buckets but the last.
        share: Which quantile, in [0, 1].

    Returns:
        The quantile, at most the last bound; None without values or bounds.
    """
    count = size(found)
    if not count or not bounds:
        return None
    wanted, below = share * count, 0.0
    for at, here in enumerate(found["counts"][:-1]):
        if here and below + here >= wanted:
            low = bounds[at - 1] if at else min(0.0, bounds[0])
            return low + (bounds[at] - low) * max(wanted - below, 0.0) / here
        below += here
    return bounds[-1]
