"""Attention masks of a `Placement`: settled slots, open nodes, windows by distance in the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sedac_hf.core.row_pass import Placement

__all__ = ["additive_mask", "slots_in_use", "visible_slots"]


def slots_in_use(at: Placement) -> int:
    """Slots up to the largest that is in use.

    Args:
        at: Where the nodes stand.
    """
    return int(at.length.max()) + at.open


def visible_slots(at: Placement, window: int | None = None) -> npt.NDArray[np.bool_]:
    """Which slots each node sees.

    Args:
        at: Where the nodes stand.
        window: Positions that a node of a sliding layer looks back, itself among them; None for
            all. The distance is counted along the node's own path, not in slots.

    Returns:
        `[rows, n, slots in use]`.
    """
    rows = len(at.length)
    seen = np.zeros((rows, at.nodes, slots_in_use(at)), np.bool_)
    for row in range(rows):
        length = int(at.length[row])
        tree = at.tree[row]
        if window is None:
            seen[row, :, at.first[row] : length] = True
            seen[row, :, length : length + at.open] = tree
            continue
        rank = tree.cumsum(axis=1)  # of each open node among those that a node sees, from 1
        depth = rank[:, -1:]
        settled = np.arange(at.first[row], length)
        seen[row, :, at.first[row] : length] = length - settled + depth - 1 < window
        seen[row, :, length : length + at.open] = tree & (depth - rank < window)
    return seen


def additive_mask(seen: npt.NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask to be added to attention scores.

    Args:
        seen: Which slots each node sees, `[rows, n, slots]`.
        dtype: Type of the states.
        device: Where the mask belongs.

    Returns:
        `[rows, 1, n, slots]`: 0 where a slot is seen, the type's lowest number elsewhere.
    """
    hidden = torch.from_numpy(~seen).unsqueeze(1).to(device)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)
