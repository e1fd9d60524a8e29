"""The base's own arguments for its layers, with masks that it makes itself: chains only."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.row_cache import RowCache
    from sedac_hf.core.row_pass import Placement
    from sedac_hf.core.stand_ins import LayerCall

__all__ = ["ChainCalls"]

IntArray = npt.NDArray[np.int64]


class ChainCalls:
    """Records how the base calls its layers for nodes that follow a text.

    The base's prologue is given the mask ``[rows, slots]`` that it is given in its own `generate`,
    so that whatever it makes of it (a causal mask, a bias by position, chunks) is its own.
    """

    def __init__(self, shell: BaseShell, cache: RowCache) -> None:
        """Begin with nothing recorded.

        Args:
            shell: Shell of the base.
            cache: The cache that the layers write to; all rows end at one slot.
        """
        self._shell = shell
        self._cache = cache
        names = inspect.signature(type(shell.base).forward).parameters
        self._takes_positions = "position_ids" in names
        self._at: Placement | None = None
        self._calls: list[LayerCall] = []

    def embed(self, tokens: Tensor, positions: IntArray) -> Tensor:
        """Embeddings of tokens.

        Args:
            tokens: Token ids `[rows, n]`.
            positions: Position ids `[rows, n]`.

        Returns:
            States `[rows, n, width]`.
        """
        tokens = tokens.to(self._shell.input_device)
        hidden, _ = self._shell.prologue(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
            **self._positions(positions),
        )
        return hidden

    def at(self, at: Placement, first: IntArray) -> list[LayerCall]:
        """Calls of all layers for a placement, at which the cache is aimed already.

        Args:
            at: Where the nodes stand.
            first: First slot of each row that is no padding, as its K/V lie now, `[rows]`.
        """
        if self._at is not at:
            device = self._shell.input_device
            slots = torch.arange(self._cache.writing.top, device=device)
            seen = slots >= torch.from_numpy(first).to(device).unsqueeze(1)
            _, self._calls = self._shell.prologue(
                input_ids=torch.zeros(at.positions.shape, dtype=torch.long, device=device),
                attention_mask=seen.long(),
                **self._positions(at.positions),
                **self._shell.cached(self._cache),
            )
            self._at = at
        return self._calls

    def _positions(self, positions: IntArray) -> dict[str, Tensor]:
        if not self._takes_positions:
            return {}
        given = torch.from_numpy(np.array(positions)).to(self._shell.input_device)
        return {"position_ids": given}
