"""K/V of rows of different lengths, in slots that can be written again and moved together.

Storage grows by chunks. Layers of one shape lie in one block, so that accepted nodes of all of
them are moved by one gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

__all__ = ["RowCache", "RowLayer", "Writing"]

IntArray = npt.NDArray[np.int64]

_CHUNK = 256  # slots by which storage grows


class Writing:
    """Where the nodes of the running call are written; shared by all layers of a cache.

    Attributes:
        top: Slots in use, those of the call included.
        nodes: Nodes of the call.
        start: First slot of the nodes where they are the same for all rows, else None.
        rows: Row of each node, `[rows, 1]`.
        slots: Slot of each node, `[rows, n]`.
    """

    def __init__(self) -> None:
        """Nothing is written yet."""
        self.top = self.nodes = 0
        self.start: int | None = 0
        self.rows = torch.zeros((0, 1), dtype=torch.long)
        self.slots = torch.zeros((0, 0), dtype=torch.long)

    def point(self, slots: IntArray, top: int) -> None:
        """Aim at the slots of a call.

        Args:
            slots: Slot of each node, `[rows, n]`; the nodes of a row stand side by side.
            top: Slots in use.
        """
        self.top, self.nodes = top, slots.shape[1]
        first = slots[:, 0]
        self.start = int(first[0]) if (first == first[0]).all() else None
        if self.start is None:
            self.slots = torch.from_numpy(slots)
            self.rows = torch.arange(len(slots)).unsqueeze(1)


class _Block:
    """K and V of some layers of one shape, `[layers, rows, heads, slots, width]` each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._set(keys, values)

    def _set(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        # Made once: a view for each layer at each step is a cost of its own.
        self.layers = list(zip(keys.unbind(0), values.unbind(0), strict=True))

    def reserve(self, slots: int) -> None:
        """Make room for `slots`."""
        if slots > self.keys.shape[3]:
            room = -(-slots // _CHUNK) * _CHUNK
            self._set(_grown(self.keys, room), _grown(self.values, room))

    def move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` of some rows to slots `target`, both `[rows, n]`."""
        rows, source, target = (x.to(self.keys.device) for x in (rows, source, target))
        for kept in (self.keys, self.values):
            kept[:, rows, :, target] = kept[:, rows, :, source]


def _grown(kept: Tensor, room: int) -> Tensor:
    layers, rows, heads, slots, width = kept.shape
    # Slots that were never written are masked, but a NaN in them would get through.
    larger = kept.new_zeros((layers, rows, heads, room, width))
    larger[:, :, :, :slots] = kept
    return larger


class RowLayer(CacheLayerMixin):
    """One layer's K/V, written at the slots of the running call."""

    is_compileable = False
    is_sliding = False

    def __init__(self, writing: Writing) -> None:
        """Begin empty.

        Args:
            writing: Where the running call writes.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._writing = writing
        self.block: _Block | None = None
        self.place = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take storage of the layer's own, for a layer that nothing was loaded into."""
        self.block = _Block(
            *(
                x.new_zeros((1, x.shape[0], x.shape[1], 0, x.shape[3]))
                for x in (key_states, value_states)
            )
        )
        self.place = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the nodes of the running call; K/V of all slots in use."""
        writing = self._writing
        if self.block is None:
            self.lazy_initialization(key_states, value_states)
        block = self.block
        assert block is not None
        block.reserve(writing.top)
        keys, values = block.layers[self.place]
        if writing.start is not None:
            nodes = key_states.shape[2]
            keys.narrow(2, writing.start, nodes).copy_(key_states)
            values.narrow(2, writing.start, nodes).copy_(value_states)
        else:
            rows, slots = writing.rows.to(keys.device), writing.slots.to(keys.device)
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        return keys.narrow(2, 0, writing.top), values.narrow(2, 0, writing.top)

    def get_seq_length(self) -> int:
        """Slots before those of the running call."""
        return self._writing.top - self._writing.nodes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns."""
        return self._writing.top, 0

    def get_max_length(self) -> int:
        """None: the layer grows."""
        return -1


class RowCache(Cache):
    """A transformers cache whose layers are `RowLayer`s."""

    layers: list[Any]

    def __init__(self, num_layers: int) -> None:
        """Begin empty.

        Args:
            num_layers: Layers of the base and of all heads.
        """
        self.writing = Writing()
        super().__init__(layers=[RowLayer(self.writing) for _ in range(num_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the nodes of the running call to one layer."""
        kept: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return kept

    def fill(
        self, layers: Sequence[int], given: Sequence[tuple[Tensor, Tensor]], length: int
    ) -> None:
        """Load K/V of a prompt.

        Args:
            layers: Layers to load.
            given: K and V of each, `[rows, heads, have, width]`: the last `have` of all slots.
            length: Slots that every row holds.
        """
        groups: dict[Any, list[int]] = {}
        for place, (keys, values) in enumerate(given):
            kind = (keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device)
            groups.setdefault(kind, []).append(place)
        room = -(-(length + _CHUNK // 2) // _CHUNK) * _CHUNK
        for places in groups.values():
            block = _Block(*(_room_for(given[places[0]][i], len(places), room) for i in (0, 1)))
            for at, place in enumerate(places):
                keys, values = given[place]
                # A window that has moved on holds the last slots only; the mask hides the others.
                first = length - keys.shape[2]
                block.keys[at, :, :, first:length] = keys
                block.values[at, :, :, first:length] = values
                layer = self.layers[layers[place]]
                layer.block, layer.place = block, at

    def move(self, layers: Sequence[int], rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy slots within rows.

        Args:
            layers: Layers to do it in: all that share a block, or none of them.
            rows: Row of each slot, `[rows, 1]`.
            source: Slots to copy, `[rows, n]`.
            target: Where to, `[rows, n]`.
        """
        blocks = {id(self.layers[i].block): self.layers[i].block for i in layers}
        for block in blocks.values():
            if block is not None:
                block.move(rows, source, target)

    def shift(self, layers: Sequence[int], by: IntArray, slots: int) -> None:
        """Move whole rows along their slots.

        Args:
            layers: Layers to do it in, as for `move`.
            by: How far each row goes, `[rows]`; below 0 towards the first slot.
            slots: Slots in use afterwards; what is moved beyond them or before the first is lost.
        """
        for block in {id(self.layers[i].block): self.layers[i].block for i in layers}.values():
            if block is not None:
                block.reserve(slots)
        rows = np.flatnonzero(by)
        target = np.broadcast_to(np.arange(slots), (len(rows), slots))
        source = np.clip(target - by[rows, None], 0, slots - 1)
        at = torch.from_numpy(rows).unsqueeze(1)
        self.move(layers, at, torch.from_numpy(source), torch.from_numpy(target.copy()))

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of some slots of a layer, `[rows, heads, stop - start, width]`."""
        kept = self.layers[layer]
        keys, values = kept.block.layers[kept.place]
        return keys[:, :, start:stop], values[:, :, start:stop]


def _room_for(like: Tensor, layers: int, room: int) -> Tensor:
    rows, heads, _, width = like.shape
    return like.new_zeros((layers, rows, heads, room, width))
