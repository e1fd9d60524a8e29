"""How much to draft."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Shape"]


@dataclass(frozen=True)
class Shape:
    """Size of the trees of one cycle.

    Attributes:
        nodes: Nodes verified at most, the root among them.
        levels: Calls of the exit head at most; 0 for none.
        width: Nodes that each level behind the first expands.
        least: Probability below which a node is not worth its place.
        least_level: Probability of the best candidate below which no further level is run.
    """

    nodes: int
    levels: int
    width: int
    least: float = 0.0
    least_level: float = 0.0
