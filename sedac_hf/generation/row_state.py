"""Where the rows of an exact decode stand: settled slots, padding, positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.row_pass import Placement

__all__ = ["RowState", "chain_mask", "gather_nodes"]

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class RowState:
    """Settled slots of the base's part, and what follows from them.

    Attributes:
        first: First slot of each row that is no padding, `[rows]`.
        length: Settled slots of each row, `[rows]`.
    """

    def __init__(self, first: IntArray, length: IntArray, position: IntArray) -> None:
        """Begin behind a prompt.

        Args:
            first: First slot that is no padding, `[rows]`.
            length: Slots that the prompt takes, `[rows]`.
            position: Position id of the next token, `[rows]`.
        """
        self.first = first
        self.length = length
        self._offset = position - length

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.length)

    def positions(self, length: IntArray, depths: IntArray) -> IntArray:
        """Position ids of nodes `depths` steps behind `length` slots, `[rows, n]`."""
        return (length + self._offset)[:, None] + depths

    def place(self, depths: IntArray, tree: Mask, length: IntArray | None = None) -> Placement:
        """Where nodes stand.

        Args:
            depths: Steps behind the settled slots, `[rows, n]`.
            tree: Which open nodes each sees, `[rows, n, open]`.
            length: Settled slots of the part, `[rows]`; None for the base's.
        """
        at = self.length if length is None else length
        return Placement(self.first, at, self.positions(at, depths), tree)


def chain_mask(counts: IntArray, nodes: int) -> Mask:
    """Chains of different lengths; what lies behind a row's own sees itself alone.

    Args:
        counts: Nodes of each row's chain, `[rows]`.
        nodes: Nodes of the call.

    Returns:
        `[rows, nodes, nodes]`.
    """
    order = np.arange(nodes)
    real = order[None, :] < counts[:, None]
    lower = order[None, :, None] >= order[None, None, :]
    return (lower & real[:, :, None] & real[:, None, :]) | np.eye(nodes, dtype=np.bool_)


def gather_nodes(states: Tensor, nodes: IntArray) -> Tensor:
    """States of some nodes of each row.

    Args:
        states: `[rows, nodes, width]`.
        nodes: Which, `[rows, n]`.

    Returns:
        `[rows, n, width]`.
    """
    index = torch.from_numpy(np.ascontiguousarray(nodes)).to(states.device)
    rows = torch.arange(len(nodes), device=states.device).unsqueeze(1)
    return states[rows, index]
