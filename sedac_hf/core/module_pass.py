"""The `RowPass` over the base's own modules, for every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from sedac_hf.core.row_cache import RowCache
from sedac_hf.core.row_calls import RowCalls
from sedac_hf.core.row_masks import slots_in_use
from sedac_hf.core.row_pass import BASE
from sedac_hf.errors import CacheError

if TYPE_CHECKING:
    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.decoder_loop import ExitParts, LayerPass
    from sedac_hf.core.narrow_tail import KeptChannels
    from sedac_hf.core.row_pass import Placement
    from sedac_hf.core.stand_ins import LayerCall

__all__ = ["ModulePass", "cache_fits", "layer_windows", "readable_layers"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

# Kinds of layers whose K/V lie in order; others (quantised, offloaded by a class of their own)
# keep them in forms that cannot be taken over.
_READABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class ModulePass:
    """Runs nodes through the base's modules and the exit heads, with K/V in slots of its own.

    One object serves one call of `generate`.
    """

    holds_trees = True

    def __init__(self, parts: ExitParts) -> None:
        """Begin with empty rows.

        Args:
            parts: What exits are made of, brought up to date.
        """
        self._parts = parts
        shell = parts.shell
        depth = shell.num_layers
        first = parts.layout.first_layer
        self._layers: dict[int, list[int]] = {BASE: list(range(depth))}
        for k, head in enumerate(parts.heads):
            self._layers[k] = list(range(first[k], first[k] + head.cache_layers))
        count = depth + sum(head.cache_layers for head in parts.heads)
        self._cache = RowCache(count)
        self._calls = RowCalls(shell, self._cache, layer_windows(shell))
        self._loaded = 0

    def rest(self, done: Mask) -> None:
        """See `RowPass.rest`; all rows go through the base's modules together."""

    def load(self, cache: Any) -> IntArray:
        """See `RowPass.load`.

        Raises:
            CacheError: If the cache keeps K/V in a form that cannot be taken over.
        """
        if (reason := cache_fits(cache, self._parts.shell.num_layers)) is not None:
            raise CacheError(reason)
        self._loaded = length = int(cache.get_seq_length())
        rows = int(cache.layers[0].keys.shape[0])
        for layers in self._layers.values():
            if layers and layers[-1] < len(cache.layers):
                given = [_kept(cache.layers[i], length) for i in layers]
                self._cache.fill(layers, given, length)
        return np.full(rows, length, np.int64)

    def store(self, cache: Any, length: IntArray, *, heads: bool = True) -> None:
        """See `RowPass.store`.

        Raises:
            CacheError: If the cache has no room left.
        """
        start, stop = self._loaded, int(length.max())
        if stop <= start:
            return
        parts = self._layers if heads else [BASE]
        for i in (i for k in parts for i in self._layers[k] if i < len(cache.layers)):
            layer = cache.layers[i]
            room = layer.get_max_length()
            if isinstance(layer, StaticLayer) and not layer.is_sliding and stop > room:
                raise CacheError(
                    f"A static cache of {room} positions was to take {stop}. Ask for a larger one "
                    "(max_new_tokens beyond what it was made for?), or for a dynamic cache."
                )
            keys, values = self._cache.read(i, start, stop)
            layer.update(keys, values)
        self._loaded = stop

    def embed(self, tokens: Tensor, positions: IntArray) -> Tensor:
        """See `RowPass.embed`."""
        return self._calls.embed(tokens, positions)

    def layers(
        self,
        hidden: Tensor,
        at: Placement,
        start: int,
        stop: int,
        kept: KeptChannels | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """See `RowPass.layers`."""
        calls = self._begin(BASE, hidden, at)
        passes = cast("LayerPass", self._parts.passes)
        return passes.run(hidden, calls, start, stop, kept=kept, spread=spread)

    def head(self, k: int, hidden: Tensor, feedback: Tensor | None, at: Placement) -> Tensor:
        """See `RowPass.head`."""
        calls = self._begin(k, hidden, at)
        return self._parts.apply_head(k, hidden, calls, self._cache, feedback)

    def fill(self, k: int, hidden: Tensor, feedback: Tensor | None, at: Placement) -> None:
        """See `RowPass.fill`."""
        calls = self._begin(k, hidden, at)
        self._parts.fill_head(k, hidden, calls, self._cache, feedback)

    def catch_up(self) -> None:
        """See `RowPass.catch_up`; heads follow the prompt as the base reads it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """See `RowPass.logits`."""
        return self._parts.shell.logits(hidden)

    def best(self, hidden: Tensor) -> tuple[IntArray, Mask]:
        """See `RowPass.best`."""
        top = self.logits(hidden).max(-1)
        return np.asarray(top.indices.cpu()), np.asarray(torch.isfinite(top.values).cpu())

    def draft_top(self, hidden: Tensor, count: int) -> tuple[IntArray, FloatArray]:
        """See `RowPass.draft_top`."""
        logits = self._draft_logits(hidden).float()
        top = logits.topk(min(count, logits.shape[-1]), dim=-1)
        chances = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
        return np.asarray(top.indices.cpu()), np.asarray(chances.cpu())

    def _draft_logits(self, hidden: Tensor) -> Tensor:
        return self._parts.shell.logits(hidden, vocabulary=self._parts.draft.linear)

    def keep(self, part: int, length: IntArray, path: IntArray, counts: IntArray) -> None:
        """See `RowPass.keep`."""
        layers = self._layers[part]
        order = np.arange(path.shape[1])
        # What stands where it belongs, in every row, needs no copying.
        moves = (path != order) & (order < counts[:, None])
        columns = np.flatnonzero(moves.any(axis=0))
        if not layers or not len(columns):
            return
        columns = np.arange(columns[0], columns[-1] + 1)
        target = length[:, None] + columns[None, :]
        source = np.where(moves[:, columns], length[:, None] + path[:, columns], target)
        rows = torch.arange(len(length)).unsqueeze(1)
        self._cache.move(layers, rows, torch.from_numpy(source), torch.from_numpy(target))

    def _begin(self, part: int, hidden: Tensor, at: Placement) -> list[LayerCall]:
        """Aim the cache of a part at a placement; calls of all layers."""
        self._cache.writing.point(at.slots, slots_in_use(at))
        return self._calls.at(at, hidden)


def cache_fits(cache: Any, num_layers: int) -> str | None:
    """Why a cache cannot be loaded, or None when it can.

    Args:
        cache: A transformers cache after a prompt.
        num_layers: Decoder layers of the base.
    """
    count = len(getattr(cache, "layers", ()))
    if count < num_layers or not readable_layers(cache):
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
        return (
            f"Drafting needs a dynamic or static cache of {num_layers} layers; found "
            f"{type(cache).__name__} with {count} layers {kinds or ''}. Use "
            "cache_implementation='dynamic' or 'static', or another mode."
        )
    if int(cache.get_seq_length()) == 0:
        return "Drafting goes on from a prompt; this cache is empty."
    return None


def readable_layers(cache: Any) -> bool:
    """Whether a cache keeps K/V in order and where they are computed.

    Args:
        cache: A transformers cache, filled or not.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return False
    replicate = getattr(cache, "layer_class_to_replicate", None)
    kinds = {type(layer) for layer in layers} | ({replicate} if replicate else set())
    return kinds <= set(_READABLE)


def layer_windows(shell: BaseShell) -> list[int | None]:
    """Window of each layer of the base, None where it sees everything.

    Args:
        shell: Shell of the base.
    """
    layers = DynamicCache(config=shell.base.config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return [None if w is None else int(w) for w in windows[: shell.num_layers]]


def _kept(layer: Any, length: int) -> tuple[Tensor, Tensor]:
    """K and V that a cache layer holds: the last ones of all positions."""
    have = min(length, int(layer.keys.shape[2]))
    keys, values = layer.keys[:, :, :have], layer.values[:, :, :have]
    return cast(Tensor, keys), cast(Tensor, values)
