"""Native passes over tiny models, and the base's own forward beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.exit_heads import ExitHead
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import Placement
from tests.tiny_models import WINDOW

# Two roots; node 2 follows the first, 3 and 4 the second, 5 follows 4.
PATHS = ((0,), (1,), (0, 2), (1, 3), (1, 4), (1, 4, 5))
LENGTH = WINDOW + 3  # beyond the windows of the tiny models


def started(base: PreTrainedModel, heads: Sequence[ExitHead] = ()) -> NativePass:
    return NativePass(NativeModel(BaseShell(base), heads))


@contextmanager
def step_by_step() -> Iterator[None]:
    """Loops in Python run every step, as in calls that whole cycles of the core do not serve."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("exact", "settled"):
            patch.setattr(f"sedac_hf.generation.{module}.core_cycles", lambda *args, **values: None)
        yield


def behind(lengths: Sequence[int], nodes: int, first: Sequence[int] | None = None) -> Placement:
    """Chains of `nodes` nodes behind settled slots."""
    length = np.array(lengths, np.int64)
    start = np.zeros_like(length) if first is None else np.array(first, np.int64)
    tree = np.broadcast_to(np.tril(np.ones((nodes, nodes), np.bool_)), (len(length), nodes, nodes))
    positions = (length - start)[:, None] + np.arange(nodes)[None]
    return Placement(start, length, positions, np.ascontiguousarray(tree))


def tree_behind(length: int) -> Placement:
    """The tree of `PATHS` behind settled slots of one row."""
    tree = np.zeros((1, len(PATHS), len(PATHS)), np.bool_)
    for node, path in enumerate(PATHS):
        tree[0, node, list(path)] = True
    positions = np.array([[length + len(path) - 1 for path in PATHS]], np.int64)
    zero = np.zeros(1, np.int64)
    return Placement(zero, zero + length, positions, tree)


def logits_of(run: NativePass, ids: Tensor, at: Placement) -> Tensor:
    hidden = run.layers(run.embed(ids, at.positions), at, 0, run.num_layers)
    return run.logits(hidden)


@torch.no_grad()
def prompted(base: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    cache = DynamicCache(config=base.config)
    given = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if mask is not None:
        given.update(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    base(**given)
    return cache


@torch.no_grad()
def by_the_base(base: PreTrainedModel, ids: Tensor) -> Tensor:
    return base(input_ids=ids, use_cache=False).logits
