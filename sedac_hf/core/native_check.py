"""Compares the native pass with the base's own layers before anything relies on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sedac_hf.core.row_pass import Placement
from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf.core.native_model import NativeModel, NativeParts

__all__ = ["check_native"]

_PROMPT = 12
# Share of what a layer adds by which the two may differ, and of its output where that is rounded.
_TOLERANCE = {
    torch.float32: (1e-3, 1e-5),
    torch.float16: (2e-2, 2e-3),
    torch.bfloat16: (5e-2, 1e-2),
}


@torch.no_grad()
def check_native(model: NativeModel, parts: NativeParts) -> None:
    """Run a short text through each layer both ways, each time from the base's own states.

    Args:
        model: The base and its exit heads.
        parts: What the Rust core was told.

    Raises:
        NotNativeError: If layers, heads, embedding or logits differ by more than rounding.
    """
    from sedac_hf.core.native_pass import NativePass

    shell, heads = model.shell, model.exit_heads
    ids = (torch.arange(1, _PROMPT + 1) * 7 % shell.vocabulary_size).unsqueeze(0)
    hidden, calls = shell.prologue(input_ids=ids, use_cache=False)
    at = chain(_PROMPT)
    native = NativePass.of_parts(model, parts)
    native.begin(1)
    if not torch.equal(native.embed(ids, at.positions), hidden.float()):
        raise NotNativeError("it does more to its embeddings than its embedding module")
    for i, call in enumerate(calls):
        expected = shell.layer(i, hidden, call, None)
        found = native.layers(hidden, at, i, i + 1)
        _compare(f"layer {i}", hidden, expected, found)
        hidden = expected
    for k, head in enumerate(heads):
        if parts.heads[k] is None:
            continue
        call = calls[head.spec.resolved(shell.num_layers).template_layer]
        feedback = hidden.roll(1, dims=1) if head.spec.feedback else None
        head_call = shell.with_cache(call, None)
        expected = head(hidden, head_call, None, 0, feedback)
        found = native.head(k, hidden, feedback, at)
        _compare(f"the exit block after layer {head.layer_idx}", hidden, expected, found)
    zero = torch.zeros(1)
    _compare("the head", zero, shell.logits(hidden), native.logits(hidden))


def chain(nodes: int, past: int = 0) -> Placement:
    """One row whose nodes follow one another behind `past` settled slots."""
    tree = np.tril(np.ones((nodes, nodes), np.bool_))[None]
    positions = np.arange(past, past + nodes, dtype=np.int64)[None]
    zero = np.zeros(1, np.int64)
    return Placement(zero, zero + past, positions, tree)


def _compare(name: str, before: Tensor, expected: Tensor, found: Any) -> None:
    share, rounding = _TOLERANCE[expected.dtype]
    wide = expected.float()
    gap = float((found.float() - wide).norm())
    added = float((wide - before.float()).norm())
    allowed = share * added + rounding * float(wide.norm())
    if not gap <= allowed:
        raise NotNativeError(
            f"{name} computes something else than the native pass: they differ by {gap:.3g}, "
            f"rounding allows {allowed:.3g}"
        )
