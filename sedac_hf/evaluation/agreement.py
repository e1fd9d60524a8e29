"""Whether two ways to write gave the same tokens, and by how little they parted.

Logits of low resolution tie often, so that rounding alone parts two orders of summation. The gap
between the two candidates at the first differing token, in units of the resolution there, tells
such a tie from an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sedac_hf.evaluation.arms import Batch
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["Divergence", "base_logits", "divergences", "rows_equal"]


@dataclass(frozen=True)
class Divergence:
    """The first token at which a row differs from the base's.

    Attributes:
        position: Its place among the new tokens.
        gap: Distance of the base's logits of the two tokens there; NaN if one is not finite.
        units: The same in units of the data type's resolution at the larger of the two.
    """

    position: int
    gap: float
    units: float


def rows_equal(ours: Tensor, theirs: Tensor) -> list[bool]:
    """Which rows of two texts are the same, length included.

    Args:
        ours: Token ids `[rows, length]`.
        theirs: Token ids `[rows, other length]`.
    """
    if ours.shape != theirs.shape:
        return [False] * len(ours)
    return [bool(same) for same in (ours == theirs).all(dim=1)]


def divergences(
    batch: Batch, ours: Tensor, theirs: Tensor, logits: Callable[[Tensor], Tensor]
) -> list[Divergence]:
    """Where each row of a text parts from the base's, and how close it was.

    Args:
        batch: The prompts.
        ours: Text of some mode, `[rows, length + new]`.
        theirs: Text of the base, the same prompts.
        logits: The base's logits `[vocabulary]` for the token after some text `[1, tokens]`.

    Returns:
        One entry for each row that differs.
    """
    found = []
    length = min(ours.shape[1], theirs.shape[1])
    start = batch.ids.shape[1]
    for row in range(len(ours)):
        apart = (ours[row, start:length] != theirs[row, start:length]).nonzero()
        if not len(apart):
            continue
        at = start + int(apart[0])
        scores = logits(batch.row(theirs, row, at))
        pair = scores[torch.stack([ours[row, at], theirs[row, at]])]
        gap = float((pair[0].double() - pair[1].double()).abs())
        found.append(Divergence(at - start, gap, gap / _resolution(pair)))
    return found


def _resolution(values: Tensor) -> float:
    """Distance of neighbouring numbers of the data type at the largest of some values."""
    largest = float(values.double().abs().max())
    if not math.isfinite(largest):
        return math.nan
    limits = torch.finfo(values.dtype)
    return float(limits.eps) * 2.0 ** math.floor(math.log2(max(largest, limits.tiny)))


def base_logits(model: SedacForCausalLM) -> Callable[[Tensor], Tensor]:
    """The base's logits for the next token, in its own data type.

    Args:
        model: The wrapped model.

    Returns:
        A function from token ids `[1, tokens]` to logits `[vocabulary]`.
    """

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        output: Any = model(input_ids=ids, use_cache=False, logits_to_keep=1, exits="off")
        scores: Tensor = output.logits[0, -1]
        return scores

    return logits
