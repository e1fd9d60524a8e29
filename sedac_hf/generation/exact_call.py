"""What a call of `generate` hands to exact mode, and which calls it cannot serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sedac_hf.core.cache_names import cache_in, cache_name
from sedac_hf.core.module_pass import readable_layers
from sedac_hf.generation.acceptance import processors_by_row
from sedac_hf.generation.logits_processor import SedacLogitsProcessor
from sedac_hf.generation.row_state import RowState
from sedac_hf.generation.row_texts import criteria_by_row

if TYPE_CHECKING:
    from transformers import GenerationConfig, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from sedac_hf.generation.row_texts import RowTexts

__all__ = ["ExactCall", "outcome", "padding_of", "rows_behind", "why_not"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExactCall:
    """One call of `_sample`, as transformers hands it over."""

    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None

    @property
    def own_processors(self) -> LogitsProcessorList:
        """The processors without this package's own, which has nothing to do here."""
        others = [each for each in self.processors if not isinstance(each, SedacLogitsProcessor)]
        return LogitsProcessorList(others)


def why_not(call: ExactCall, model_kwargs: dict[str, Any]) -> str | None:
    """Why a call cannot be decoded in exact mode, or None when it can.

    Args:
        call: The call.
        model_kwargs: What transformers carries from step to step.
    """
    rows = call.input_ids.shape[0]
    cache = cache_in(model_kwargs)
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    reasons = {
        "attentions and hidden states of each step were asked for": (
            call.config.output_attentions or call.config.output_hidden_states
        ),
        "there is no cache to draft on": cache is None or not model_kwargs.get("use_cache", True),
        "the kind of cache cannot hold drafts": cache is not None and not readable_layers(cache),
        "a stopping criterion looks at the whole batch": (
            rows > 1 and not criteria_by_row(call.criteria)
        ),
        "a logits processor looks at the whole batch": (
            rows > 1 and not processors_by_row(call.own_processors)
        ),
        "the position ids are not [rows, positions]": (
            positions is not None and positions.dim() != 2
        ),
        "the attention mask hides more than padding on the left": (
            mask is not None and _padding(mask) is None
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def padding_of(model_kwargs: dict[str, Any]) -> IntArray | None:
    """First slot of each row that is no padding, `[rows]`; None without a mask.

    Args:
        model_kwargs: What transformers carries from step to step.
    """
    mask = model_kwargs.get("attention_mask")
    return None if mask is None else _padding(mask)


def rows_behind(model_kwargs: dict[str, Any], length: IntArray) -> RowState:
    """Where the rows stand behind the prompt.

    Args:
        model_kwargs: What transformers carries from step to step, the next step prepared.
        length: Slots that the prompt takes, `[rows]`.
    """
    positions, padding = model_kwargs.get("position_ids"), padding_of(model_kwargs)
    first = np.zeros_like(length) if padding is None else padding
    following = length - first
    if positions is not None:
        following = np.asarray(positions[:, -1].cpu(), np.int64)
    return RowState(
        np.broadcast_to(first, length.shape).copy(),
        length,
        np.broadcast_to(following, length.shape).copy(),
    )


def outcome(texts: RowTexts, call: ExactCall, model_kwargs: dict[str, Any]) -> Any:
    """What `generate` returns for finished texts: sequences, or an output object.

    Args:
        texts: The texts.
        call: The call.
        model_kwargs: What transformers carries from step to step; holds the cache.
    """
    sequences = texts.sequences()
    if not call.config.return_dict_in_generate:
        return sequences
    output: Any = GenerateDecoderOnlyOutput
    return output(
        sequences=sequences,
        scores=texts.scores(),
        logits=texts.logits(),
        **{cache_name(output): cache_in(model_kwargs)},
    )


def _padding(mask: Any) -> IntArray | None:
    """First slot of each row that is no padding, `[rows]`; None if padding lies elsewhere too."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    seen = np.asarray(mask.cpu(), np.bool_)
    first = np.where(seen.any(axis=1), seen.argmax(axis=1), 0).astype(np.int64)
    whole = seen | (np.arange(seen.shape[1]) < first[:, None])
    return first if whole.all() else None
