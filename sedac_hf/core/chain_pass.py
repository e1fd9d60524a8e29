"""The `RowPass` for bases that cannot be given a mask of ours: they hold chains, no trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sedac_hf.core.chain_calls import ChainCalls
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.errors import SedacError

if TYPE_CHECKING:
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.row_pass import Placement
    from sedac_hf.core.stand_ins import LayerCall

__all__ = ["ChainPass"]

IntArray = npt.NDArray[np.int64]


class ChainPass(ModulePass):
    """Runs chains through the base's modules under masks that the base makes itself.

    To the base a call is an ordinary step of a batch with padding on the left: all rows end at one
    slot, and rows that have fallen behind begin later. Rows are moved along their slots when what
    they accept parts them.
    """

    holds_trees = False

    def __init__(self, parts: ExitParts) -> None:
        """Begin with empty rows.

        Args:
            parts: What exits are made of, brought up to date.
        """
        super().__init__(parts)
        self._chains = ChainCalls(parts.shell, self._cache)
        # By how many slots each row of a part lies behind where a `Placement` counts it.
        self._offsets: dict[int, IntArray] = {}
        self._used: dict[int, int] = {}

    def load(self, cache: Any) -> IntArray:
        """See `RowPass.load`."""
        length = super().load(cache)
        for part in self._layers:
            self._offsets[part] = np.zeros_like(length)
            self._used[part] = int(length.max())
        return length

    def store(self, cache: Any, length: IntArray, *, heads: bool = True) -> None:
        """See `RowPass.store`."""
        for part, offsets in self._offsets.items():
            self._align(part, np.zeros_like(offsets))
        super().store(cache, length, heads=heads)

    def embed(self, tokens: Tensor, positions: IntArray) -> Tensor:
        """See `RowPass.embed`."""
        return self._chains.embed(tokens, positions)

    def keep(self, part: int, length: IntArray, path: IntArray, counts: IntArray) -> None:
        """See `RowPass.keep`; the beginning of a chain stands where it belongs."""
        order = np.arange(path.shape[1])
        if ((path != order) & (order < counts[:, None])).any():
            raise SedacError(
                "Expected the beginning of a chain to be kept, found nodes of a tree: this base "
                "makes its masks itself and holds chains only (RowPass.holds_trees)."
            )

    def _begin(self, part: int, hidden: Tensor, at: Placement) -> list[LayerCall]:
        """Bring all rows of a part to one end and aim the cache behind it."""
        end = int(at.length.max())
        offsets = end - at.length
        self._align(part, offsets)
        top = end + at.open
        slots = np.arange(top - at.nodes, top)
        self._cache.writing.point(np.broadcast_to(slots, at.positions.shape), top)
        self._used[part] = max(self._used[part], top)
        return self._chains.at(at, at.first + offsets)

    def _align(self, part: int, offsets: IntArray) -> None:
        """Move rows so that they lie by `offsets` slots behind where they are counted."""
        by = offsets - self._offsets[part]
        if by.any():
            self._used[part] += max(int(by.max()), 0)
            self._cache.shift(self._layers[part], by, self._used[part])
            self._offsets[part] = offsets
