"""Compares the shell with the base it wraps, once, before anything relies on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.core.cache_names import cache_in
from sedac_hf.core.support import own_draw
from sedac_hf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell, LayerCall

__all__ = ["self_check"]

_PROMPT, _SEED = 4, 0


@torch.no_grad()
def self_check(shell: BaseShell) -> None:
    """Run a prompt of four tokens and one decode step through the base and through the shell.

    Args:
        shell: Shell of the base.

    Raises:
        UnsupportedModelError: If logits or cache lengths differ, which says that the base does more
            between its layers than calling them one after the other.
    """
    device = shell.input_device
    ids = torch.arange(1, _PROMPT + 2, device=device).unsqueeze(0) % shell.vocabulary_size

    def loop(hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        for i, call in enumerate(calls):
            hidden = shell.layer(i, hidden, call)
        return hidden

    # Dropout, if the base is in training mode, must fall alike on both sides.
    with own_draw(device):
        expected = _two_steps(shell, lambda **kwargs: shell.base(**kwargs), ids)
        found = _two_steps(shell, lambda **kwargs: shell.run(loop, **kwargs), ids)
    name = type(shell.base).__name__
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
            gap = float((ours.float() - theirs.float()).abs().max())
            raise UnsupportedModelError(
                f"{name}: running its layers one by one changes the logits by up to {gap:.3g}, so "
                "its decoder does something between them that exits would skip. This architecture "
                "is not supported."
            )
    if found[2] != expected[2]:
        raise UnsupportedModelError(
            f"{name}: run layer by layer its cache layers hold {found[2]} positions instead of "
            f"{expected[2]}. This architecture is not supported."
        )


def _two_steps(shell: BaseShell, forward: Any, ids: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of the prompt and of the step after it, and the lengths of the cache layers."""
    torch.manual_seed(_SEED)
    first = forward(input_ids=ids[:, :_PROMPT], use_cache=True)
    cache = cache_in(first)
    second = forward(input_ids=ids[:, _PROMPT:], **shell.cached(cache))
    lengths = [int(cache.get_seq_length(i)) for i in range(len(cache))]
    return first.logits, second.logits, lengths
