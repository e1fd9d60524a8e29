"""Cycles of exact mode: how one went, and what others should take and bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sedac_hf.generation.costs import PassCosts, Tally

__all__ = ["HIT_NODES", "ROWS_SHARE", "Cycle", "off_cycle", "one_level"]

HIT_NODES = (2, 3, 5, 9)  # nodes of a tree of the root and a head's first 1, 2, 4 or 8
ROWS_SHARE = 0.7  # of the rows' mean, what the one furthest behind may be taken to gain


@dataclass
class Cycle:
    """One cycle as it went.

    Attributes:
        on: Whether drafting with the head was allowed.
        drafted: Whether the head was asked.
        levels: Seconds of each call of the head, with what belongs to it.
        nodes: Nodes verified.
        verify: Seconds from the drafts to the next roots.
        rows: Rows that took part.
        tokens: Tokens that they gained together.
        gain: Tokens that the row furthest behind gained; a batch ends when its last row does. None
            for the mean of the rows.
        rest: Seconds of everything else in the cycle.
        is_whole: Whether no row had ended before; times of others say little of a whole batch.
    """

    on: bool = False
    drafted: bool = False
    levels: list[float] = field(default_factory=list)
    nodes: int = 1
    verify: float = 0.0
    rows: int = 1
    tokens: int = 1
    gain: float | None = None
    rest: float = 0.0
    is_whole: bool = True


def off_cycle(full: PassCosts) -> tuple[Tally, Tally]:
    """Tokens and seconds of a cycle without a head, before one was seen.

    Args:
        full: What passes through all layers take.
    """
    # Timed passes leave out what belongs to a cycle besides: soon only cycles count.
    return Tally(1.0, 8.0), Tally(full.of(1), 2.0, 0.95)


def one_level(
    tail: PassCosts, level: float, hits: Sequence[float], share: float
) -> tuple[float, float]:
    """Tokens and seconds of a cycle with one level of drafts, of the size that serves best.

    Args:
        tail: What passes take from the head's checkpoint on.
        level: Seconds of one call of the head.
        hits: How often the base's choice is among the head's first 1, 2, 4 and 8.
        share: Of what drafts bring the rows on average, what the row furthest behind has of it.
    """
    options = [
        (1 + hit * share, level + tail.of(nodes))
        for nodes, hit in zip(HIT_NODES, hits, strict=True)
    ]
    return max(options, key=lambda option: option[0] / max(option[1], 1e-9))
