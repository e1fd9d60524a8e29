"""Tiny models whose exits are soft, and what they must do, said another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sedac_hf.calibration import channel_order
from sedac_hf.calibration.documents import Document
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import VOCABULARY, prompt
from tests.wrapping import rule, wrap

# The projection back to the state, by what its module is called.
DOWN = ("down_proj", "c_proj", "dense_4h_to_h")


def documents(count: int = 4, length: int = 24, seed: int = 5) -> list[Document]:
    """Random documents without prompts."""
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(3, VOCABULARY, length), 0) for _ in range(count)]


def soft_model(
    base: PreTrainedModel,
    strategy: str = "soft",
    kinds: dict[int, str] | None = None,
    *,
    share: float = 0.6,
    steepness: float = 6.0,
    **values: Any,
) -> SedacForCausalLM:
    """A wrapped base some of whose tokens are sure at each checkpoint.

    Args:
        base: The base.
        strategy: A soft strategy.
        kinds: Layer -> kind of head, as for `wrap`.
        share: Share of random tokens that are sure at the first checkpoint.
        steepness: Steepness of the skipped share.
        **values: As for `wrap`.
    """
    kinds = kinds or {0: "lens", 2: "lens"}
    closed = [rule(layer, 0.0) for layer in kinds]
    model = wrap(base, kinds, closed, strategy=strategy, **values)
    model.set_channel_order(channel_order(base, documents()))
    risks = model(prompt(4, 16, seed=9), exits="simulate").risks.flatten(0, 1)
    rules = [
        rule(layer, 2.013 * float(risks[:, k].quantile(share))) for k, layer in enumerate(kinds)
    ]
    assert model.cascade is not None
    model.set_cascade(replace(model.cascade, layers=tuple(rules), steepness=steepness))
    return model


def down_projections(base: PreTrainedModel) -> list[nn.Module]:
    """Each layer's projection from its channels back to the state."""
    named = [(name.split("."), module) for name, module in base.named_modules()]
    return [module for name, module in named if name[-1] in DOWN and "mlp" in name]


def importances(base: PreTrainedModel, texts: Sequence[Document]) -> list[Tensor]:
    """Mean magnitude of what goes into each of these projections times its columns' norms."""
    sums: list[list[Tensor]] = [[] for _ in down_projections(base)]

    def listen(place: list[Tensor]) -> Callable[..., None]:
        return lambda module, given: place.append(given[0].abs().flatten(0, -2))

    found = zip(down_projections(base), sums, strict=True)
    handles = [module.register_forward_pre_hook(listen(place)) for module, place in found]
    with torch.no_grad():
        for text in texts:
            base(torch.from_numpy(text.ids)[None])
    for handle in handles:
        handle.remove()
    norms = [module.weight for module in down_projections(base)]
    # GPT-2 keeps its matrices the other way round: inputs first.
    norms = [
        w.norm(dim=1 if type(module).__name__ == "Conv1D" else 0)
        for w, module in zip(norms, down_projections(base), strict=True)
    ]
    return [torch.cat(place).mean(0) * norm for place, norm in zip(sums, norms, strict=True)]


def eighths_by_hand(
    strategy: str, steepness: float, confidence: float, place: int, tail: int
) -> int:
    """Eighths that layer `place` of a tail of `tail` layers keeps."""
    skipped = 1 / (1 + math.exp(-steepness * (confidence - 0.5)))
    if strategy == "adaptive-soft":
        skipped *= 2 * (place + 0.5) / tail
    return min(8, max(1, math.ceil(8 * (1 - min(skipped, 1.0)) - 1e-6)))


@contextmanager
def channels_zeroed(
    base: PreTrainedModel, eighths: Tensor, order: Sequence[Tensor]
) -> Iterator[None]:
    """Inside the block the base multiplies every channel that is not kept by zero.

    Args:
        base: The base.
        eighths: Kept eighths, `[layers, rows, seq]`.
        order: Channels of each layer, the most important first.
    """

    def cut(layer: int) -> Callable[..., Any]:
        channels = len(order[layer])
        rank = torch.empty(channels, dtype=torch.long)
        rank[order[layer]] = torch.arange(channels)
        kept = torch.ceil(channels * eighths[layer].double() / 8).unsqueeze(-1)
        return lambda module, given: (given[0] * (rank < kept).view(*kept.shape[:-1], -1),)

    modules = down_projections(base)
    handles = [module.register_forward_pre_hook(cut(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
