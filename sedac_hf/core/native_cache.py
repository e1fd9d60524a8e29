"""K/V between a transformers cache and the native pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sedac_hf.core.row_pass import BASE, IntArray
from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf import _core
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["PassKv", "append_slots", "check_layer", "load_layer"]


class PassKv:
    """The K/V of one native pass: the base's, and those of the exit heads that run natively.

    Attributes:
        loaded: Slots of each row that a transformers cache has too, `[rows]`.
    """

    def __init__(self, shell: BaseShell, head_layers: Sequence[int]) -> None:
        """Start without rows.

        Args:
            shell: Shell of the base.
            head_layers: Layers with K/V of each exit head.
        """
        self.loaded = np.zeros(0, np.int64)
        self._shell = shell
        self._head_layers = list(head_layers)
        self._parts: list[_core.KvCache | None] = []

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(part.nbytes for part in self._parts if part is not None)

    def begin(self, stacks: Sequence[_core.LayerStack | None], rows: int) -> None:
        """Start with empty rows.

        Args:
            stacks: The base's layers, then those of each head; None where torch runs a head.
            rows: How many.
        """
        self._parts = [None if stack is None else stack.cache(rows) for stack in stacks]
        self.loaded = np.zeros(rows, np.int64)

    def find(self, part: int) -> _core.KvCache | None:
        """K/V of a part, `BASE` or a head; None if it has none, or no rows yet."""
        return self._parts[part + 1] if part + 1 < len(self._parts) else None

    def load(self, cache: Any, length: int) -> None:
        """Take over what a transformers cache holds, after `begin`.

        Args:
            cache: The cache; it is not changed.
            length: Positions that it has seen.

        Raises:
            NotNativeError: If a layer keeps its K/V in a way that cannot be read.
        """
        for _, own, first, count in self._places():
            for i in range(count):
                if first + i < len(cache.layers):
                    load_layer(own, i, cache.layers[first + i], length, self._shell.base.dtype)
        self.loaded[:] = length

    def store(self, cache: Any, length: IntArray, *, heads: bool) -> None:
        """Append to a transformers cache what it lacks; see `RowPass.store`."""
        start = int(self.loaded[0])
        if int(length.max()) <= start:
            return
        dtype = self._shell.base.dtype
        for part, own, first, count in self._places():
            if part != BASE and not heads:
                continue
            for i in range(count):
                # An empty cache makes its layers as they come; exit heads' are there or not wanted.
                if part == BASE or first + i < len(cache.layers):
                    append_slots(own, i, cache, first + i, start, length, dtype)
        self.loaded[:] = int(length.max())

    def _places(self) -> list[tuple[int, _core.KvCache, int, int]]:
        """Parts with K/V, where they begin in a transformers cache, and how many layers."""
        found, first = [], 0
        counts = [self._shell.num_layers, *self._head_layers]
        for index, (own, count) in enumerate(zip(self._parts, counts, strict=True)):
            if own is not None:
                found.append((index - 1, own, first, count))
            first += count
        return found


def check_layer(layer: Any) -> None:
    """Refuse a layer whose K/V do not lie in order.

    Args:
        layer: A layer of a transformers cache.

    Raises:
        NotNativeError: If it keeps them otherwise.
    """
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
        raise NotNativeError(
            f"a {type(layer).__name__} of the cache cannot be read in place; use a DynamicCache"
        )


def load_layer(own: _core.KvCache, i: int, layer: Any, length: int, dtype: torch.dtype) -> None:
    """Take over one layer.

    Args:
        own: Where to put it.
        i: Which layer of `own`.
        layer: A layer of a transformers cache; it is not changed.
        length: Positions that the cache has seen.
        dtype: Type that `own` keeps.

    Raises:
        NotNativeError: If the layer keeps its K/V in a way that cannot be read.
    """
    check_layer(layer)
    seen = int(layer.get_seq_length())
    if seen == 0 or layer.keys is None:
        return
    keys, values = layer.keys, layer.values
    if isinstance(layer, StaticLayer):
        keys, values = keys[:, :, :seen], values[:, :, :seen]
    # A window keeps the last positions only; earlier ones are seen by nobody.
    held = int(keys.shape[-2])
    whole = [tensor.detach().to("cpu", dtype).contiguous() for tensor in (keys, values)]
    own.load(i, seen - held, whole[0].data_ptr(), whole[1].data_ptr(), held)


def append_slots(
    own: _core.KvCache,
    i: int,
    cache: Any,
    layer_idx: int,
    start: int,
    length: IntArray,
    dtype: torch.dtype,
) -> None:
    """Append the slots from `start` on to a layer of a transformers cache.

    Args:
        own: Where they are.
        i: Which layer of `own`.
        cache: The transformers cache.
        layer_idx: Which of its layers.
        start: First slot that it lacks.
        length: Settled slots of each row, `[rows]`; shorter rows are padded with zeros.
        dtype: Type that `own` keeps.
    """
    rows, heads, dim = own.shape(i)
    count = int(length.max()) - start
    keys, values = (torch.zeros((rows, heads, count, dim), dtype=dtype) for _ in range(2))
    slots = np.ascontiguousarray(length, np.int64)
    own.store(i, start, slots, keys.data_ptr(), values.data_ptr(), count)
    # An empty layer takes the type of what it is given first.
    like = cache.layers[layer_idx].keys if layer_idx < len(cache.layers) else None
    if like is not None:
        keys, values = keys.to(like), values.to(like)
    cache.update(keys, values, layer_idx)
