"""Perplexity of texts under any causal language model, as the `evaluate` metric reports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sedac_hf.calibration.documents import Document
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.perplexity import exits_act, paired_perplexity
from sedac_hf.modeling import SedacForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["text_perplexity"]


def text_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Perplexity over texts; with a model that exits early, also that of its base.

    Args:
        model: A causal language model, with exits or without.
        tokenizer: Its tokenizer.
        texts: The texts.
        max_length: Tokens of a text that are used.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.

    Returns:
        `perplexity` over all scored tokens, `perplexities` of each text (None for a text that
        cannot be scored), their mean `mean_perplexity`, `exit_share`, `mean_depth` and `depth`;
        with exits also `base_perplexity`, `ppl_increase` and `ppl_increase_ci95`.

    Raises:
        CalibrationError: If no text has at least 2 tokens.
    """
    encoded = [
        np.asarray(tokenizer(text, truncation=True, max_length=max_length)["input_ids"], np.int64)
        for text in texts
    ]
    usable = [i for i, ids in enumerate(encoded) if ids.size >= 2]
    if not usable:
        raise CalibrationError(
            f"none of {len(texts)} texts has at least 2 tokens, so there is nothing to predict."
        )
    wrapped = (
        model
        if isinstance(model, SedacForCausalLM)
        else SedacForCausalLM.from_base(model, self_check=False)
    )
    mode = wrapped.config.mode
    exits = exits_act(wrapped, mode) and mode not in wrapped.refused_modes
    found = paired_perplexity(
        wrapped, [Document(encoded[i]) for i in usable], exits=exits, batch_tokens=batch_tokens
    )
    perplexities: list[float | None] = [None] * len(texts)
    for i, row in zip(usable, found.per_document, strict=True):
        nll = row["sedac_nll"] if row["base_nll"] is not None else None
        perplexities[i] = None if nll is None else float(np.exp(nll))
    known = [value for value in perplexities if value is not None]
    result: dict[str, Any] = {
        "perplexity": found.sedac_ppl,
        "perplexities": perplexities,
        "mean_perplexity": float(np.mean(known)) if known else None,
        "exit_share": found.exit_share,
        "mean_depth": found.mean_depth,
        "depth": found.depth,
    }
    if exits:
        result |= {
            "base_perplexity": found.base_ppl,
            "ppl_increase": found.ppl_increase,
            "ppl_increase_ci95": list(found.ppl_increase_ci95),
        }
    return result
