"""The base's own rotary tables for the native pass, kept where position alone decides them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedac_hf.errors import NotNativeError

__all__ = ["RotaryTables"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Kinds whose angles follow from the position; others also depend on the longest position of a call.
_BY_POSITION = {"default", "linear", "llama3", "yarn"}
_CHUNK = 1024  # positions by which the tables grow


class RotaryTables:
    """Cosines and sines per position, one pair of tables for each kind of layer."""

    def __init__(self, decoder: Any, layer_types: Sequence[str | None], dtype: torch.dtype) -> None:
        """Find the decoder's rotary module.

        Args:
            decoder: The module that owns the layers.
            layer_types: What the configuration calls each layer, or None for each.
            dtype: Type of the states; the tables are rounded to it as the base rounds them.

        Raises:
            NotNativeError: If the decoder has no rotary module.
        """
        module = getattr(decoder, "rotary_emb", None)
        if not isinstance(module, nn.Module):
            raise NotNativeError(f"{type(decoder).__name__} has no rotary_emb")
        self._module: Any = module
        by_type = "layer_type" in inspect.signature(type(module).forward).parameters
        kinds = sorted({kind or "" for kind in layer_types}) if by_type else []
        self._arguments: list[tuple[Any, ...]] = [(kind,) for kind in kinds] or [()]
        self.of_layer = [kinds.index(kind or "") if by_type else 0 for kind in layer_types]
        self._dtype = dtype
        types = getattr(module, "rope_type", None)
        named = set(types.values()) if isinstance(types, dict) else {types}
        self._by_position = named <= _BY_POSITION
        self._tables: list[tuple[FloatArray, FloatArray]] = []
        self._lock = threading.Lock()

    @property
    def tensors(self) -> list[Tensor]:
        """What the tables are derived from."""
        return list(self._module.buffers())

    def rows(self, positions: IntArray) -> list[tuple[FloatArray, FloatArray]]:
        """Tables of some positions.

        Args:
            positions: Position ids `[rows, n]`.

        Returns:
            For each kind, cosines and sines `[rows * n, rotated width]`.
        """
        tables = self.up_to(int(positions.max(initial=0)))
        if tables is None:
            return self._compute(torch.from_numpy(positions))
        flat = positions.reshape(-1)
        return [(cos[flat], sin[flat]) for cos, sin in tables]

    def up_to(self, most: int) -> list[tuple[FloatArray, FloatArray]] | None:
        """Tables of all positions up to one of them, at least.

        Args:
            most: The position.

        Returns:
            For each kind, cosines and sines `[positions, rotated width]`; None where they depend on
            more than a position.
        """
        if not self._by_position:
            return None
        tables = self._tables
        return tables if tables and most < len(tables[0][0]) else self._grown(most)

    def _grown(self, most: int) -> list[tuple[FloatArray, FloatArray]]:
        with self._lock:
            stop = (most // _CHUNK + 1) * _CHUNK
            self._tables = self._compute(torch.arange(stop)[None])
            return self._tables

    @torch.no_grad()
    def _compute(self, positions: Tensor) -> list[tuple[FloatArray, FloatArray]]:
        like = torch.empty((1, 1, 1), dtype=self._dtype)
        found = []
        for arguments in self._arguments:
            pair = self._module(like, positions, *arguments)
            cos, sin = (table.float().flatten(0, -2).contiguous().numpy() for table in pair)
            found.append((cos, sin))
        return found
