"""Whether the base's modules can serve trees or chains, found out by running a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.row_pass import Placement
from sedac_hf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.decoder_loop import ExitParts

__all__ = ["attention_reason", "chain_reason", "tree_reason"]

# A small tree: two paths of different lengths from a common root.
_PARENTS_SEEN = ((1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 1, 0, 1))
_PATHS = ((0, 1, 3), (0, 2))
_PROMPT = 3
# What each of two rows keeps of a chain, so that they part: more, then less than the other.
_KEPT = ((3, 1), (1, 3))
_CHAIN = 3
# What decoders raise that expect other arguments than they are given.
_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def attention_reason(parts: ExitParts) -> str | None:
    """Why the base's attention can be handed no mask at all, or None when it can.

    Args:
        parts: What exits are made of.
    """
    base = parts.shell.base
    if base.config._attn_implementation in ("sdpa", "eager"):
        return None
    return (
        f"{type(base).__name__} uses the attention {base.config._attn_implementation!r}, which "
        "takes no mask of a tree. Load the base with attn_implementation='sdpa' or 'eager'."
    )


def tree_reason(parts: ExitParts) -> str | None:
    """Why `ModulePass` cannot serve a model, or None when it can.

    Args:
        parts: What exits are made of.
    """
    config = parts.shell.base.config
    name = type(parts.shell.base).__name__
    own = {*(getattr(config, "layer_types", None) or ()), *getattr(config, "attention_layers", ())}
    if own & {"chunked_attention", "local"}:
        return f"{name} limits attention by slots rather than by distance, which breaks trees."
    try:
        return _judged(parts, _tree_pairs, "nodes of a tree")
    except UnsupportedModelError as error:
        return str(error)
    except _ERRORS as error:
        return f"{name} does not take a mask [rows, 1, nodes, slots] of its own making: {error}"


def chain_reason(parts: ExitParts) -> str | None:
    """Why `ChainPass` cannot serve a model, or None when it can.

    Args:
        parts: What exits are made of.
    """
    name = type(parts.shell.base).__name__
    try:
        return _judged(parts, _chain_pairs, "nodes of a chain")
    except _ERRORS as error:
        return f"{name} does not run a chain behind a text of other length: {error}"


@torch.no_grad()
def _judged(
    parts: ExitParts, pairs: Callable[[ExitParts], Iterator[tuple[Tensor, Tensor]]], what: str
) -> str | None:
    """Why logits found differ too much from those expected, or None."""
    base = parts.shell.base
    gap, scale = 0.0, 0.0
    for found, expected in pairs(parts):
        difference = found.to(expected.device).float() - expected.float()
        gap = max(gap, float(difference.abs().nan_to_num(nan=torch.inf).max()))
        scale = max(scale, float(expected.abs().max()))
    gap /= max(scale, 1e-6)
    exact = base.dtype in (torch.float32, torch.float64)
    if gap <= (1e-3 if exact else 5e-2):
        return None
    return (
        f"{type(base).__name__}: {what} come out otherwise than their paths alone (by {gap:.2g} of "
        "the largest logit)."
    )


def _tree_pairs(parts: ExitParts) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of a small tree's paths, and the base's own."""
    shell = parts.shell
    ids = _words(shell, 1, _PROMPT + 4)
    before, nodes = ids[:, :_PROMPT], ids[:, _PROMPT:]
    cache = DynamicCache(config=shell.base.config)
    _forward(shell, before, cache)
    run = ModulePass(parts)
    length = run.load(cache)
    tree = np.array([_PARENTS_SEEN], np.bool_)
    at = Placement(np.zeros(1, np.int64), length, length[:, None] + tree.sum(-1) - 1, tree)
    found = run.logits(run.layers(run.embed(nodes, at.positions), at, 0, shell.num_layers))
    for path in _PATHS:
        expected = _forward(shell, torch.cat([before, nodes[:, path]], dim=1))[:, _PROMPT:]
        yield found[:, path], expected


def _chain_pairs(parts: ExitParts) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of chains behind texts that part, and the base's own on each text."""
    shell = parts.shell
    ids = _words(shell, 2, _PROMPT + _CHAIN * (len(_KEPT) + 1))
    cache = DynamicCache(config=shell.base.config)
    _forward(shell, ids[:, :_PROMPT], cache)
    run = ChainPass(parts)
    length = run.load(cache)
    texts = list(ids[:, :_PROMPT])
    tree = np.broadcast_to(np.tri(_CHAIN, dtype=np.bool_), (2, _CHAIN, _CHAIN))
    for cycle, kept in enumerate([*_KEPT, (0, 0)]):
        start = _PROMPT + _CHAIN * cycle
        nodes = ids[:, start : start + _CHAIN]
        found = []
        for step in (slice(0, 1), slice(1, _CHAIN)):
            positions = length[:, None] + np.arange(_CHAIN)[None, step]
            at = Placement(np.zeros(2, np.int64), length, positions, tree[:, step, : step.stop])
            hidden = run.embed(nodes[:, step], positions)
            found.append(run.logits(run.layers(hidden, at, 0, shell.num_layers)))
        for row, text in enumerate(texts):
            whole = torch.cat([text, nodes[row]])[None]
            yield torch.cat(found, dim=1)[row], _forward(shell, whole)[0, -_CHAIN:]
        texts = [torch.cat([text, nodes[row, : kept[row]]]) for row, text in enumerate(texts)]
        length = length + np.array(kept, np.int64)


def _words(shell: BaseShell, rows: int, count: int) -> Tensor:
    ids = torch.arange(1, rows * count + 1).view(rows, count) % shell.vocabulary_size
    return ids.to(shell.input_device)


def _forward(shell: BaseShell, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    given = {"use_cache": False} if cache is None else shell.cached(cache)
    logits: Tensor = shell.base(input_ids=ids, **given).logits
    return logits
