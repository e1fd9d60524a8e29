"""Which `RowPass` serves a model, and whether one does at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import IntArray, Placement, RowPass
from sedac_hf.errors import NotNativeError, UnsupportedModelError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.decoder_loop import ExitParts

__all__ = ["PassChoice", "choose_pass", "load_into", "module_pass_reason"]

logger = logging.getLogger(__name__)

# A small tree: two paths of different lengths from a common root.
_PARENTS_SEEN = ((1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 1, 0, 1))
_PATHS = ((0, 1, 3), (0, 2))
_PROMPT = 3
# What decoders raise that expect a mask [rows, positions] and nothing else.
_MASK_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class PassChoice:
    """What runs the layers for loops that draft, settle or verify.

    Attributes:
        name: `"native"`, `"modules"`, or `"none"` when nothing can.
        reason: Why nothing better serves this model; empty when nothing is to be said.
        build: Makes a pass for one call of `generate` from the parts as they are for that call;
            None when nothing can.
    """

    name: str
    reason: str
    build: Callable[[ExitParts], RowPass] | None


def load_into(run: RowPass, parts: ExitParts, cache: Any) -> tuple[RowPass, IntArray]:
    """Let a pass take over a cache, or another one where it cannot.

    Args:
        run: The pass of a call.
        parts: What exits are made of, as they are for the call.
        cache: A transformers cache after the prompt.

    Returns:
        The pass, and the slots of each row that hold something, `[rows]`.

    Raises:
        CacheError: If nothing can read the cache.
    """
    try:
        return run, run.load(cache)
    except NotNativeError as error:
        logger.info("This call runs on the base's own modules: %s", error)
        run = ModulePass(parts)
        return run, run.load(cache)


def choose_pass(parts: ExitParts) -> PassChoice:
    """Pick the pass for a model; runs a few tokens through it to find out.

    With `SEDAC_PASS=modules` in the environment it is never the native one.

    Args:
        parts: What exits are made of, brought up to date.
    """
    native = NativeModel(parts.shell, parts.heads)
    wanted = os.environ.get("SEDAC_PASS", "auto") != "modules"
    reason = native.reason if wanted else "SEDAC_PASS=modules is set"
    if reason is None:
        return PassChoice("native", "", partial(_native_or_modules, native))
    if (modules := module_pass_reason(parts)) is not None:
        return PassChoice("none", modules, None)
    return PassChoice("modules", reason, ModulePass)


def _native_or_modules(native: NativeModel, parts: ExitParts) -> RowPass:
    """The native pass, unless the base has changed (an adapter, a hook) since it was admitted."""
    try:
        return NativePass(native, parts.draft.linear)
    except NotNativeError as error:
        if module_pass_reason(parts) is not None:
            raise
        logger.warning("This call runs on the base's own modules: %s", error)
        return ModulePass(parts)


@torch.no_grad()
def module_pass_reason(parts: ExitParts) -> str | None:
    """Why `ModulePass` cannot serve a model, or None when it can.

    Args:
        parts: What exits are made of.
    """
    shell = parts.shell
    config = shell.base.config
    name = type(shell.base).__name__
    if config._attn_implementation not in ("sdpa", "eager"):
        return (
            f"{name} uses the attention {config._attn_implementation!r}, which takes no mask of a "
            "tree. Load the base with attn_implementation='sdpa' or 'eager'."
        )
    own = {*(getattr(config, "layer_types", None) or ()), *getattr(config, "attention_layers", ())}
    if own & {"chunked_attention", "local"}:
        return f"{name} limits attention by slots rather than by distance, which breaks trees."
    try:
        gap = _largest_gap(parts)
    except UnsupportedModelError as error:
        return str(error)
    except _MASK_ERRORS as error:
        return f"{name} does not take a mask [rows, 1, nodes, slots] of its own making: {error}"
    exact = shell.base.dtype in (torch.float32, torch.float64)
    if not gap <= (1e-3 if exact else 5e-2):
        return (
            f"{name}: nodes of a tree come out otherwise than their paths alone (by {gap:.2g} of "
            "the largest logit), so it runs without drafts."
        )
    return None


def _largest_gap(parts: ExitParts) -> float:
    """Largest difference between a small tree and the base's forward of its paths, relative."""
    shell = parts.shell
    ids = (torch.arange(1, _PROMPT + 5) % shell.vocabulary_size).unsqueeze(0)
    ids = ids.to(shell.input_device)
    before, nodes = ids[:, :_PROMPT], ids[:, _PROMPT : _PROMPT + 4]
    cache = DynamicCache(config=shell.base.config)
    _forward(shell, before, cache)
    run = ModulePass(parts)
    length = run.load(cache)
    tree = np.array([_PARENTS_SEEN], np.bool_)
    at = Placement(np.zeros(1, np.int64), length, length[:, None] + tree.sum(-1) - 1, tree)
    found = run.logits(run.layers(run.embed(nodes, at.positions), at, 0, shell.num_layers))
    gap, scale = 0.0, 0.0
    for path in _PATHS:
        expected = _forward(shell, torch.cat([before, nodes[:, path]], dim=1))[:, _PROMPT:]
        difference = found[:, path].to(expected.device).float() - expected.float()
        gap = max(gap, float(difference.abs().max()))
        scale = max(scale, float(expected.abs().max()))
    return gap / max(scale, 1e-6)


def _forward(shell: BaseShell, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    given = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    logits: Tensor = shell.base(input_ids=ids, **given).logits
    return logits
