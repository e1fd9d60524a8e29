"""Recognises embeddings that the Rust core can read in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sedac_hf import _core
from sedac_hf.core.native_layers import describe_matrix
from sedac_hf.core.weights import has_no_hooks
from sedac_hf.errors import NotNativeError

__all__ = ["describe_embedding"]


@torch.no_grad()
def describe_embedding(module: nn.Module) -> _core.Embedding | None:
    """An embedding whose rows are taken as they are, or scaled by a number of its own.

    Args:
        module: The base's input embeddings; kept as long as what is returned.

    Returns:
        The embedding; None for other modules, hooked ones, and those that turn out to do something
        else with their rows.
    """
    if not isinstance(module, nn.Embedding) or not has_no_hooks(module):
        return None
    if module.max_norm is not None:
        return None
    scale: Any = getattr(module, "embed_scale", None)
    if scale is not None:
        scale = float(torch.as_tensor(scale).to(module.weight.dtype))
    try:
        made = _core.Embedding(describe_matrix(module.weight), scale)
    except NotNativeError:
        return None
    # What the class makes of its rows is settled by numbers, never by its name.
    words = sorted({0, 1 % module.num_embeddings, module.num_embeddings - 1})
    expected = module(torch.tensor(words)).float().reshape(-1)
    found = torch.tensor(made.look_up(torch.tensor(words).numpy()))
    return made if torch.equal(found, expected) else None
