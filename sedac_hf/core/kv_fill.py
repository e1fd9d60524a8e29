"""Fills the K/V of layers that an exited token skips, from its frozen state (`propagate`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sedac_hf.core.stacked_kv import StackedKV, build_stacked_kv
from sedac_hf.errors import SedacError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell, LayerCall

__all__ = ["KVFill", "KVOnlyCache", "write_layer_kv"]


class _Filled(BaseException):
    """Leaves a layer once its K/V are written; never seen outside this file."""


class KVOnlyCache:
    """Cache proxy that writes what a layer gives it and then stops the layer.

    Every architecture hands K and V to `update` after norm, projection, key norm and rotary
    embedding, so what is written is exactly what the layer itself would have written.
    """

    def __init__(self, cache: Any) -> None:
        """Wrap `cache`, which stays the place the K/V are written to."""
        self._cache = cache

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Write and leave the layer."""
        self._cache.update(*args, **kwargs)
        raise _Filled

    def __getattr__(self, name: str) -> Any:
        """Everything else is the cache's own."""
        return getattr(self._cache, name)


def write_layer_kv(layer: nn.Module, hidden: Tensor, call: LayerCall) -> None:
    """Run a decoder layer just as far as its K/V.

    Args:
        layer: The layer.
        hidden: States `[rows, seq, width]`.
        call: Its arguments, with a `KVOnlyCache` in place of the cache.
    """
    try:
        layer(hidden, *call.args, **call.kwargs)
    except _Filled:
        return
    raise SedacError(
        f"{type(layer).__name__} did not hand its K/V to the cache, so a skipped layer cannot be "
        "filled in."
    )


class KVFill:
    """Fills skipped layers: by one stacked product where that is proven right, else by proxy."""

    def __init__(self, shell: BaseShell, first_layer: int = 0, *, stacked: bool = True) -> None:
        """Prepare for a base.

        Args:
            shell: Shell of the base.
            first_layer: Lowest layer that will ever be filled; those below need no stacking.
            stacked: Whether the stacked product may be used at all.
        """
        self._shell = shell
        self._first_layer = first_layer
        self._allowed = stacked
        self._stacked: StackedKV | None = None
        self.prepare()

    @property
    def is_stacked(self) -> bool:
        """Whether the stacked product is in use."""
        return self._stacked is not None

    def prepare(self) -> None:
        """Rebuild the stacked product if the base's weights are no longer those it was made of."""
        if not self._allowed:
            return
        stacked = self._stacked
        if stacked is not None and stacked.is_current():
            return
        self._stacked = None
        # What is kept must be usable outside of inference mode too.
        with torch.inference_mode(False):
            built = build_stacked_kv(self._shell, self._first_layer)
            if built is not None and _agrees(self._shell, built, self._first_layer):
                self._stacked = built

    def fill(self, hidden: Tensor, calls: list[LayerCall], start: int, stop: int) -> None:
        """Write the K/V of layers `start` to `stop - 1` for positions that have left.

        Args:
            hidden: Frozen states `[rows, seq, width]`.
            calls: Recorded calls of all layers, with their cache.
            start: First layer to fill.
            stop: End of the layers to fill.
        """
        stacked = self._stacked
        if stacked is not None and start >= stacked.first_layer:
            stacked.fill(hidden, calls, start, stop, self._shell.cache_of(calls[start]))
        else:
            fill_by_proxy(self._shell, hidden, calls, start, stop)


def fill_by_proxy(
    shell: BaseShell, hidden: Tensor, calls: list[LayerCall], start: int, stop: int
) -> None:
    """Write K/V by running each layer up to its cache update."""
    if start >= stop:
        return
    proxy = KVOnlyCache(shell.cache_of(calls[start]))
    for i in range(start, stop):
        write_layer_kv(shell.layer_list[i], hidden, shell.with_cache(calls[i], proxy))


@torch.no_grad()
def _agrees(shell: BaseShell, stacked: StackedKV, first_layer: int) -> bool:
    """Whether the stacked product writes the K/V that the layers write themselves."""
    ids = torch.ones((2, 3), dtype=torch.long, device=shell.input_device)
    _, calls = shell.prologue(input_ids=ids, **shell.cached(DynamicCache()))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((2, 3, stacked.width), generator=generator)
    hidden = hidden.to(stacked.device, stacked.dtype)
    stop = shell.num_layers
    ours, theirs = DynamicCache(), DynamicCache()
    written: list[tuple[Any, Any]] = []
    stacked.fill(hidden, calls, first_layer, stop, ours)
    calls = [shell.with_cache(call, theirs) for call in calls]
    fill_by_proxy(shell, hidden, calls, first_layer, stop)
    exact = stacked.dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if exact else 4e-2  # folding the norm rounds each weight once more
    for i in range(first_layer, stop):
        mine: Any = ours.layers[i]
        own: Any = theirs.layers[i]
        written += [(mine.keys, own.keys), (mine.values, own.values)]
    return all(_close(found, expected, tolerance) for found, expected in written)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    scale = float(expected.abs().max().clamp_min(1e-6))
    return float((found - expected).abs().max()) <= tolerance * scale
