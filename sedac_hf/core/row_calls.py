"""The base's own arguments for its layers, with our masks, positions and cache in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.row_masks import additive_mask, visible_slots
from sedac_hf.core.stand_ins import LayerCall
from sedac_hf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.row_pass import Placement

__all__ = ["RowCalls"]

IntArray = npt.NDArray[np.int64]


class RowCalls:
    """Records how the base calls its layers at given positions, and puts masks of ours there.

    The base's prologue is given a mask of its own shape of ours; every layer that is handed this
    very tensor gets the mask of the placement instead. What is recorded serves all calls at the
    same positions.
    """

    def __init__(self, shell: BaseShell, cache: Any, windows: list[int | None]) -> None:
        """Begin with nothing recorded.

        Args:
            shell: Shell of the base.
            cache: The cache that the layers write to.
            windows: Window of each layer; None for layers that see everything.
        """
        self._shell = shell
        self._cache = cache
        self._windows = windows
        self._kinds = tuple(dict.fromkeys(windows))
        self._positions: IntArray | None = None
        self._recorded: list[LayerCall] = []
        self._places: list[int | str] = []  # where each layer is handed the mask
        self._at: Placement | None = None
        self._calls: list[LayerCall] = []

    def embed(self, tokens: Tensor, positions: IntArray) -> Tensor:
        """Embeddings of tokens, recording the calls at their positions on the way.

        Args:
            tokens: Token ids `[rows, n]`.
            positions: Position ids `[rows, n]`.

        Returns:
            States `[rows, n, width]`.
        """
        shell = self._shell
        device = shell.input_device
        sentinel = torch.zeros((*tokens.shape[:1], 1, tokens.shape[1], 1), dtype=shell.base.dtype)
        sentinel = sentinel.to(device)
        hidden, calls = shell.prologue(
            input_ids=tokens.to(device),
            attention_mask=sentinel,
            position_ids=torch.from_numpy(np.array(positions)).to(device),
            **shell.cached(self._cache),
        )
        self._places = [_place_of(call, sentinel, shell) for call in calls]
        self._recorded, self._positions, self._at = calls, np.array(positions), None
        return hidden

    def at(self, at: Placement, like: Tensor) -> list[LayerCall]:
        """Calls of all layers for a placement.

        Args:
            at: Where the nodes stand.
            like: States of the nodes, whose type and device the masks take.
        """
        if self._at is at:
            return self._calls
        known = self._positions
        if known is None or not np.array_equal(known, at.positions):
            self.embed(torch.zeros(at.positions.shape, dtype=torch.long), at.positions)
        masks = {window: _mask(at, window, like) for window in self._kinds}
        self._calls = [
            _with_mask(call, place, masks[window])
            for call, place, window in zip(self._recorded, self._places, self._windows, strict=True)
        ]
        self._at = at
        return self._calls


def _mask(at: Placement, window: int | None, like: Tensor) -> Tensor | None:
    seen = visible_slots(at, window)
    if at.nodes == 1 and seen.all():
        return None  # as the base itself steps: attention is faster without
    return additive_mask(seen, like.dtype, like.device)


def _place_of(call: LayerCall, mask: Tensor, shell: BaseShell) -> int | str:
    """Where a layer is handed the mask: place among the arguments, or name."""
    for place, value in enumerate(call.args):
        if value is mask:
            return place
    for name, value in call.kwargs.items():
        if value is mask:
            return name
    raise UnsupportedModelError(
        f"{type(shell.base).__name__} makes its layers' mask itself (positions as a bias of the "
        "mask, such as ALiBi), so nodes of a tree cannot be told apart."
    )


def _with_mask(call: LayerCall, place: int | str, mask: Tensor | None) -> LayerCall:
    if isinstance(place, str):
        return LayerCall(call.args, {**call.kwargs, place: mask})
    return LayerCall((*call.args[:place], mask, *call.args[place + 1 :]), call.kwargs)
