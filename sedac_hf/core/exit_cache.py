"""Where exit heads keep their K/V: in extra layers of the very cache that the base uses.

So reordering for beams, cropping and batch selection reach them without further code. When a head
is given the previous position's final state, those states have one more such layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, StaticLayer

if TYPE_CHECKING:
    from sedac_hf.core.exit_heads import ExitHead

__all__ = ["ExitCache", "predecessor_visible", "previous_states"]

_MARK = "_sedac_layout"


class ExitCache:
    """Appends, checks and reads the extra layers."""

    def __init__(self, num_layers: int, heads: Sequence[ExitHead]) -> None:
        """Lay out the extra layers.

        Args:
            num_layers: Decoder layers of the base.
            heads: Exit heads in the order of their checkpoints.
        """
        self._num_layers = num_layers
        self._templates: list[int] = []
        self.first_layer: list[int] = []
        for head in heads:
            self.first_layer.append(num_layers + len(self._templates))
            template = head.spec.resolved(num_layers).template_layer
            self._templates += [template] * head.cache_layers
        # The states of `has_feedback` come behind all heads.
        self._states_layer = num_layers + len(self._templates)
        self.has_feedback = any(head.spec.feedback for head in heads)
        self._layout = (num_layers, tuple(self._templates), self.has_feedback)

    @property
    def is_needed(self) -> bool:
        """Whether the heads keep anything at all."""
        return bool(self._templates) or self.has_feedback

    def attach(self, cache: Any) -> bool:
        """Append the extra layers to an empty cache.

        Args:
            cache: A transformers cache.

        Returns:
            Whether the cache now has them and all its layers hold equally many positions. False for
            a cache that was filled before, or without the heads.
        """
        if not self.is_needed:
            return True
        if getattr(cache, _MARK, None) == self._layout:
            return self._in_step(cache)
        if int(cache.get_seq_length()) > 0:
            return False
        layers = cache.layers
        replicate = getattr(cache, "layer_class_to_replicate", None)
        while replicate is not None and len(layers) < self._num_layers:
            layers.append(replicate())
        del layers[self._num_layers :]
        layers.extend(copy.deepcopy(layers[template]) for template in self._templates)
        if self.has_feedback:
            layers.append(_states_layer_like(layers[0]))
        setattr(cache, _MARK, self._layout)
        return True

    def _in_step(self, cache: Any) -> bool:
        length = int(cache.get_seq_length())
        stop = self._states_layer + self.has_feedback
        return all(int(cache.get_seq_length(i)) == length for i in range(self._num_layers, stop))

    def push_states(self, cache: Any, states: Tensor) -> None:
        """Keep the final-layer states of new positions.

        Args:
            cache: A cache with the extra layers.
            states: `[rows, seq, width]`.
        """
        rows, seq, _ = states.shape
        keys = states.unsqueeze(1)
        cache.layers[self._states_layer].update(keys, states.new_zeros((rows, 1, seq, 1)))

    def last_state(self, cache: Any, like: Tensor) -> Tensor:
        """The final-layer state of the last position.

        Args:
            cache: A cache with the extra layers.
            like: A state `[rows, seq, width]` whose rows, width, type and device are used.

        Returns:
            `[rows, 1, width]`, zeros when nothing came before.
        """
        layer = cache.layers[self._states_layer]
        # A window that has moved on holds fewer positions than it has seen.
        length = int(layer.get_seq_length())
        if length == 0:
            return like.new_zeros((like.shape[0], 1, like.shape[2]))
        last = min(length, layer.keys.shape[-2])
        states: Tensor = layer.keys[:, 0, last - 1 : last]
        return states.to(like.device)


def _states_layer_like(layer: object) -> Any:
    """A layer for states, preallocated where the cache is."""
    if isinstance(layer, StaticLayer):
        return copy.deepcopy(layer)
    return DynamicLayer()  # type: ignore[no-untyped-call]


def previous_states(states: Tensor, before: Tensor, visible: Tensor | None) -> Tensor:
    """Shift final-layer states by one position, so that each position sees its predecessor's.

    Args:
        states: `[rows, seq, width]`.
        before: State of the position before the first, `[rows, 1, width]`.
        visible: Whether each position's predecessor is a real token, `[rows, seq]`; None if all.

    Returns:
        `[rows, seq, width]`, zeros where there is no predecessor.
    """
    shifted = torch.cat([before.to(states.dtype), states[:, :-1]], dim=1)
    return shifted if visible is None else shifted * visible.unsqueeze(-1).to(shifted.dtype)


def predecessor_visible(mask: Any, past: int, seq: int) -> Tensor | None:
    """Whether each of the new positions has a real token before it.

    Args:
        mask: An attention mask as the base's forward takes it: None, `[rows, past + seq]`, a 4-D
            mask `[rows, 1, seq, total]` or a dict of these.
        past: Positions before the new ones.
        seq: Number of new positions.

    Returns:
        `[rows, seq]`, or None when the mask hides nothing.
    """
    if isinstance(mask, dict):
        mask = next((value for value in mask.values() if value is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        # Column c of the padded mask is position c - 1, the predecessor of c.
        return functional.pad(mask.bool(), (1, 0))[:, past : past + seq]
    seen = mask if mask.dtype == torch.bool else mask == 0
    rows = torch.arange(seq, device=mask.device)
    # A window that has moved on shows its last positions only.
    gone = max(0, past + seq - seen.shape[-1])
    return functional.pad(seen[:, 0], (1, 0))[:, rows, rows + past - gone]
