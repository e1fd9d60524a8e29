"""K/V between a transformers cache and the native pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf import _core
    from sedac_hf.core.row_pass import IntArray

__all__ = ["append_slots", "check_layer", "load_layer"]


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
