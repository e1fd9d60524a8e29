"""The trees of drafts of a batch: the core's `DraftTree` of each row, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sedac_hf._core import DraftTree

__all__ = ["BLANK", "HEAD", "LOOKUP", "NAMES", "ROOT", "DraftTree", "StackedTrees", "stack_trees"]

IntArray = npt.NDArray[np.int64]

# Where a node comes from.
BLANK, ROOT, HEAD, LOOKUP = -1, 0, 1, 2
NAMES = {BLANK: "blank", ROOT: "base", HEAD: "head", LOOKUP: "lookup"}


class StackedTrees(NamedTuple):
    """Trees of all rows, with equally many nodes each.

    Attributes:
        tokens: `[rows, nodes]`.
        parents: `[rows, nodes]`.
        depths: `[rows, nodes]`.
        seen: Which nodes each node sees, `[rows, nodes, nodes]`.
    """

    tokens: IntArray
    parents: IntArray
    depths: IntArray
    seen: npt.NDArray[np.bool_]


def stack_trees(trees: Sequence[DraftTree]) -> StackedTrees:
    """Pad trees to one size and put them side by side.

    Args:
        trees: One tree per row.
    """
    nodes = max(len(tree) for tree in trees)
    for tree in trees:
        tree.pad(nodes)
    parents = np.array([tree.parents for tree in trees], np.int64)
    seen = np.zeros((len(trees), nodes, nodes), np.bool_)
    rows = np.arange(len(trees))
    for node in range(nodes):
        if node:
            seen[:, node] = seen[rows, parents[:, node]]
        seen[:, node, node] = True
    return StackedTrees(
        np.array([tree.tokens for tree in trees], np.int64),
        parents,
        np.array([tree.depths for tree in trees], np.int64),
        seen,
    )
