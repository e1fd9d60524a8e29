"""What a pass of a few tokens costs: the native pass beside the base's own modules in torch.

`sedac bench --pass` prints it. Layers run in groups, and of each group the fastest of many rounds
counts: other work on the machine rarely spares a whole pass, but often a part of one. The sides
take turns by rounds. A round goes through all weights, so that each time they come from memory
where they do not fit into the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.huge_pages import join_pages
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import Placement
from sedac_hf.core.support import head_dim_of
from sedac_hf.errors import NotNativeError

__all__ = ["PassTiming", "memory_bandwidth", "time_passes"]

_GROUP = 3  # layers that are timed together


@dataclass(frozen=True)
class PassTiming:
    """One pass through all layers and the head.

    Attributes:
        context: Settled positions.
        nodes: Tokens of the pass.
        native_ms: Milliseconds of the native pass.
        torch_ms: The same through the base's own modules; None where it was not asked for.
        bandwidth_share: Bytes of weights and K/V over `native_ms`, as a share of the bandwidth at
            which torch sums such an array.
    """

    context: int
    nodes: int
    native_ms: float
    torch_ms: float | None
    bandwidth_share: float


@torch.inference_mode()
def memory_bandwidth(size: int = 1 << 28, rounds: int = 20) -> float:
    """Bytes a second at which torch sums an array that fits into no cache.

    Args:
        size: Bytes of the array.
        rounds: Rounds, of which the fastest counts, part by part.
    """
    whole = torch.ones(size // 8, dtype=torch.int64)
    join_pages([whole])  # as the weights are
    parts = whole.chunk(32)
    [best] = _fastest([[part.sum for part in parts]], rounds)
    return size / best


def time_passes(
    base: Any,
    nodes: Sequence[int] = (1, 2, 4, 8, 16),
    contexts: Sequence[int] = (128, 1024, 8192),
    *,
    rounds: int = 20,
    with_torch: bool = True,
) -> list[PassTiming]:
    """Time passes of a base.

    Args:
        base: A causal LM that runs natively.
        nodes: Tokens of a pass.
        contexts: Settled positions; those beyond what the model was made for are left out.
        rounds: Rounds of each, of which the fastest counts, group of layers by group.
        with_torch: Also time the base's own modules.

    Returns:
        One timing for each context and number of tokens.

    Raises:
        NotNativeError: If the base does not run natively.
    """
    shell = BaseShell(base)
    model = NativeModel(shell)
    if model.reason is not None:
        raise NotNativeError(model.reason)
    speed = memory_bandwidth(rounds=rounds)
    weights = sum(
        p.numel() * p.element_size() for layer in shell.layers for p in layer.parameters()
    )
    weights += base.get_output_embeddings().weight.nbytes
    most = int(getattr(base.config, "max_position_embeddings", 1 << 30))
    found = []
    for context in (c for c in contexts if c <= most):
        for count in nodes:
            native, held = _native_parts(model, context, count)
            sides = [native]
            if with_torch:
                sides.append(_torch_parts(shell, context, count))
            seconds = _fastest(sides, rounds)
            share = (weights + held) / seconds[0] / speed
            torch_ms = seconds[1] * 1e3 if with_torch else None
            found.append(PassTiming(context, count, seconds[0] * 1e3, torch_ms, share))
    return found


def _native_parts(
    model: NativeModel, context: int, nodes: int
) -> tuple[list[Callable[[], object]], int]:
    """Groups of layers, then the head, and the bytes of K/V that they read."""
    run = NativePass(model)
    run.begin(1)
    zero = np.zeros(1, np.int64)
    tree = np.tril(np.ones((nodes, nodes), np.bool_))[None]
    at = Placement(zero, zero + context, np.arange(context, context + nodes)[None], tree)
    states = run.embed(torch.ones((1, nodes), dtype=torch.long), at.positions)
    depth = run.num_layers
    # The first call makes room; what stands in the settled slots does not matter to the time.
    final = run.layers(states, at, 0, depth)

    def group(start: int) -> Tensor:
        return run.layers(states, at, start, min(start + _GROUP, depth))

    parts: list[Callable[[], object]] = [partial(group, i) for i in range(0, depth, _GROUP)]
    parts.append(lambda: run.logits(final))
    return parts, run.nbytes


def _torch_parts(shell: BaseShell, context: int, nodes: int) -> list[Callable[[], object]]:
    """The same through the base's modules, with a cache cut back after each round."""
    config = shell.base.config
    cache = DynamicCache(config=config)
    heads = config.num_key_value_heads
    past = torch.zeros((1, heads, context, head_dim_of(config)), dtype=shell.base.dtype)
    for i in range(shell.num_layers):
        cache.update(past, past, i)
    ids = torch.ones((1, nodes), dtype=torch.long)
    with torch.inference_mode():
        hidden, calls = shell.prologue(input_ids=ids, **shell.cached(cache))

    def group(start: int) -> Tensor:
        state = hidden
        for i in range(start, min(start + _GROUP, shell.num_layers)):
            state = shell.layer(i, state, calls[i])
            layer: Any = cache.layers[i]
            # Cut back without a copy; windows have cut themselves.
            layer.keys, layer.values = past, past
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = context
        return state

    depth = shell.num_layers
    parts: list[Callable[[], object]] = [partial(group, i) for i in range(0, depth, _GROUP)]
    parts.append(lambda: shell.logits(hidden))
    return parts


@torch.inference_mode()
def _fastest(sides: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """Seconds of all parts of each side, each part in its fastest round."""
    best = [[float("inf")] * len(parts) for parts in sides]
    for _ in range(rounds):
        for found, parts in zip(best, sides, strict=True):
            for i, part in enumerate(parts):
                start = time.perf_counter()
                part()
                found[i] = min(found[i], time.perf_counter() - start)
    return [sum(found) for found in best]
