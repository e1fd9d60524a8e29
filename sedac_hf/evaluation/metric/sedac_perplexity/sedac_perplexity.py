"""Perplexity of a causal language model, with early exits where it has them.

`evaluate` copies this file into a cache of its own and imports it from there, so that it uses
absolute imports of the installed package only.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer

import sedac_hf
from sedac_hf.evaluation.metric.texts import text_perplexity

_DESCRIPTION = """
Perplexity of a causal language model over texts. With a model that exits early every token after
the first follows the rule of decoding, K/V of exited tokens included: it is the perplexity of the
model that generates.
"""

_CITATION = ""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): Texts.
    model: A loaded model (of transformers or of sedac_hf), or a folder or name to load one from.
    tokenizer: Its tokenizer; loaded from the same place when `model` is a name.
    max_length (int): Tokens of a text that are used.
    batch_tokens (int): Most tokens of one forward, padding included.
Returns:
    perplexity: Over all scored tokens together.
    perplexities: Of each text; None for a text of fewer than 2 tokens or without a finite NLL.
    mean_perplexity: Mean of those.
    exit_share, mean_depth, depth: How far tokens went; share 0 for a model without exits.
    base_perplexity, ppl_increase, ppl_increase_ci95: Of a model with exits, against its base.
Examples:
    >>> metric = evaluate.load(metric_path())
    >>> metric.compute(predictions=texts, model=model, tokenizer=tokenizer)["perplexity"]
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SedacPerplexity(evaluate.Metric):  # type: ignore[misc]
    """Perplexity of a model over texts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: Any,
        tokenizer: Any = None,
        max_length: int = 512,
        batch_tokens: int | None = None,
    ) -> dict[str, Any]:
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if tokenizer is None:
            raise sedac_hf.SedacError(
                "a loaded model comes without its tokenizer; pass tokenizer=... as well."
            )
        return text_perplexity(
            model, tokenizer, predictions, max_length=max_length, batch_tokens=batch_tokens
        )
