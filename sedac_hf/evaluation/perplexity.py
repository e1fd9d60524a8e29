"""Perplexity of the base and of the model with exits, on the same documents."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.calibration.documents import Document, encode_texts
from sedac_hf.config import MODES
from sedac_hf.errors import CalibrationError, ModeError
from sedac_hf.evaluation.benchmark import benchmark
from sedac_hf.evaluation.intervals import bootstrap_ratio
from sedac_hf.evaluation.report import build_report, save_report
from sedac_hf.evaluation.scoring import DocumentScores, score_documents, split_hash
from sedac_hf.evaluation.settled_scoring import score_policies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.modeling import SedacForCausalLM

__all__ = [
    "PerplexityResult",
    "as_documents",
    "compared",
    "evaluate",
    "exits_act",
    "generation_prompt",
    "paired_perplexity",
]

logger = logging.getLogger(__name__)

# Tokens of a text without a prompt that generation starts from when speed is measured.
_TEXT_PROMPT = 32


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity with and without exits, and how far tokens went.

    Perplexities are over all scored tokens together. Documents that the base itself cannot score
    (a NaN or infinite NLL) are left out of both and counted.

    Attributes:
        base_ppl: Perplexity at full depth.
        sedac_ppl: Perplexity with exits; infinite when exits made an NLL infinite or NaN.
        ppl_increase: `sedac_ppl / base_ppl - 1`.
        ppl_increase_ci95: 95 % interval of it by a paired bootstrap over documents.
        document_increase: Increase of the geometric mean of the documents' perplexities, each
            document counting once: what the certificate bounds.
        exit_share: Share of the decode steps that left early.
        exits_by_layer: Decode steps that left after each checkpoint's layer.
        mean_depth: Mean number of layers that a decode step ran.
        depth: Layers of the base.
        tokens: Scored tokens.
        documents: Documents scored.
        not_scored: Documents left out because the base gives no finite NLL.
        per_document: For each document its hash, scored tokens, mean NLL of both, decode steps and
            exits; None stands for an NLL that is not finite.
        split: Hash of the documents.
        seed: Seed of the bootstrap.
        soft_exit_share: Share of the decode steps whose later layers ran on fewer channels.
        mean_kept_share: Share of all MLPs' channels that a decode step ran; 1 without soft exits.
    """

    base_ppl: float
    sedac_ppl: float
    ppl_increase: float
    ppl_increase_ci95: tuple[float, float]
    document_increase: float
    exit_share: float
    exits_by_layer: dict[int, int]
    mean_depth: float
    depth: int
    tokens: int
    documents: int
    not_scored: int
    per_document: tuple[dict[str, Any], ...]
    split: str
    seed: int
    soft_exit_share: float = 0.0
    mean_kept_share: float = 1.0


def paired_perplexity(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    *,
    cascade: CascadeConfig | None = None,
    exits: bool = True,
    baseline: SedacForCausalLM | None = None,
    full: DocumentScores | None = None,
    batch_tokens: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> PerplexityResult:
    """Perplexity of the base and of the model with exits on the same tokens.

    Args:
        model: The wrapped model.
        documents: Documents to score.
        cascade: Thresholds to use in place of the model's own.
        exits: Whether exits are final; without them (or without thresholds) both are the base.
        baseline: A wrapper whose full depth to compare with; None for the model's own base.
        full: Scores of the same documents at full depth, where they are known.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.
        resamples: Bootstrap resamples over documents.
        seed: Seed of the bootstrap.

    Returns:
        The result.

    Raises:
        CalibrationError: If no document has a token that the base can score.
    """
    rules = (cascade or model.cascade) if exits else None
    if rules is not None and full is not None:
        (exited,) = score_policies(model, documents, [rules], batch_tokens=batch_tokens)
    elif rules is not None:
        full, exited = score_policies(model, documents, [None, rules], batch_tokens=batch_tokens)
    else:
        full = score_documents(model, documents, None, exits="off", batch_tokens=batch_tokens)
        exited = full
    if baseline is not None:
        full = score_documents(baseline, documents, None, exits="off", batch_tokens=batch_tokens)
    return compared(model, documents, full, exited, resamples=resamples, seed=seed)


def compared(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    full: DocumentScores,
    exited: DocumentScores,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> PerplexityResult:
    """Compare scores of the same documents with and without exits.

    Args:
        model: The wrapped model.
        documents: The documents.
        full: Their scores at full depth.
        exited: Their scores with exits.
        resamples: Bootstrap resamples over documents.
        seed: Seed of the bootstrap.

    Returns:
        The result.

    Raises:
        CalibrationError: If no document has a token that the base can score.
    """
    usable = np.flatnonzero((full.tokens > 0) & np.isfinite(full.nll))
    if not len(usable):
        raise CalibrationError(
            f"none of {len(documents)} documents has a token that the base gives a finite NLL; "
            "check the data type of the model and that documents go beyond their prompts."
        )
    if left_out := len(documents) - len(usable):
        logger.warning("%d documents without a finite NLL under the base are left out", left_out)
    base, other = full.selected(usable), exited.selected(usable)
    # A document that exits made NaN must not drop out of the comparison.
    worse = np.where(np.isfinite(other.nll), other.nll, np.inf)
    rise = worse - base.nll
    tokens = int(base.tokens.sum())
    low, high = bootstrap_ratio(rise, base.tokens, resamples=resamples, seed=seed)
    by_layer = other.exits.sum(axis=0)
    checkpoints = [spec.layer_idx for spec in model.config.checkpoint_specs()]
    return PerplexityResult(
        base_ppl=_exp(base.nll.sum() / tokens),
        sedac_ppl=_exp(worse.sum() / tokens),
        ppl_increase=_exp(rise.sum() / tokens) - 1.0,
        ppl_increase_ci95=(_exp(low) - 1.0, _exp(high) - 1.0),
        document_increase=_exp(float((rise / base.tokens).mean())) - 1.0,
        exit_share=other.exit_share,
        exits_by_layer={layer: int(by_layer[layer + 1]) for layer in checkpoints},
        mean_depth=other.mean_depth,
        depth=len(by_layer) - 1,
        tokens=tokens,
        documents=len(usable),
        not_scored=left_out,
        per_document=tuple(
            {
                "hash": documents[i].hash,
                "tokens": int(full.tokens[i]),
                "base_nll": _finite(full.mean_nll[i]),
                "sedac_nll": _finite(exited.mean_nll[i]),
                "decode_steps": int(full.steps[i]),
                "exits": int(exited.exits[i, :-1].sum()),
            }
            for i in range(len(documents))
        ),
        split=split_hash(documents),
        seed=seed,
        soft_exit_share=other.soft_exit_share,
        mean_kept_share=other.mean_kept_share,
    )


def evaluate(
    model: SedacForCausalLM,
    documents: Sequence[Document] | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mode: str | None = None,
    speed: bool = True,
    max_new_tokens: int = 64,
    rounds: int = 5,
    batch_tokens: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Measure quality and speed of a wrapped model.

    Perplexity is that of the model that generates: every token after a document's prompt follows
    the exit rule, K/V of exited tokens included. Speed is that of real `generate()` calls on the
    documents' prompts, interleaved between base, plain loop and certified mode.

    Args:
        model: The wrapped model.
        documents: Documents, or plain texts together with a tokenizer.
        tokenizer: Turns texts into documents.
        mode: Mode to measure; None for the model's own. Exits are final in certified mode only, so
            in the others the perplexity is that of the base.
        speed: Also measure speed.
        max_new_tokens: Tokens generated for each prompt when speed is measured.
        rounds: Rounds of the speed measurement.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.
        seed: Seed of the bootstrap.
        output: File to write the report to, with a value for each document.

    Returns:
        A dict of plain values: `base_ppl`, `sedac_ppl`, `ppl_increase`, `ppl_increase_ci95`,
        `exit_share`, `exits_by_layer`, `mean_depth`, `depth`, `speed_vs_generate`,
        `speed_vs_plain`, `head_share`, `certificate`, and what they were obtained with.

    Raises:
        CalibrationError: If there is nothing to score, or texts come without a tokenizer.
        ModeError: If the mode is unknown or refused for this model.
    """
    mode = mode or model.config.mode
    if mode not in MODES:
        raise ModeError(f"mode must be one of {MODES}, found {mode!r}.")
    if mode in model.refused_modes:
        raise ModeError(f"Mode {mode!r} is refused: {model.refused_modes[mode]}")
    chosen = as_documents(documents, tokenizer)
    quality = paired_perplexity(
        model, chosen, exits=exits_act(model, mode), batch_tokens=batch_tokens, seed=seed
    )
    timing = None
    if speed:
        prompts = [generation_prompt(document) for document in chosen]
        timing = benchmark(
            model, prompts, mode=mode, max_new_tokens=max_new_tokens, rounds=rounds, seed=seed
        )
    report = build_report(model, mode, quality, timing)
    if output is not None:
        save_report(report, output)
    return report


def exits_act(model: SedacForCausalLM, mode: str) -> bool:
    """Whether exits change what the model says in a mode.

    Args:
        model: The wrapped model.
        mode: The mode.

    Returns:
        True in certified mode where the model has thresholds that may be used.
    """
    return mode == "certified" and model.cascade is not None and not model.exits_off_reason


def as_documents(
    documents: Sequence[Document] | Sequence[str], tokenizer: PreTrainedTokenizerBase | None
) -> list[Document]:
    """Documents as they are, plain texts encoded; texts of a single token are dropped.

    Args:
        documents: Documents, or plain texts.
        tokenizer: Turns texts into documents.

    Returns:
        The documents.

    Raises:
        CalibrationError: If nothing is left, or texts come without a tokenizer.
    """
    texts = [d for d in documents if isinstance(d, str)]
    ready = [d for d in documents if isinstance(d, Document)]
    if texts and tokenizer is None:
        raise CalibrationError(
            f"{len(texts)} of {len(documents)} documents are plain texts and there is no "
            "tokenizer; pass tokenizer=..., or Document objects."
        )
    if texts and tokenizer is not None:
        ready += encode_texts(texts, tokenizer, min_length=2)
    if not ready:
        raise CalibrationError(
            f"none of {len(documents)} texts has at least 2 tokens; pass longer texts."
        )
    return ready


def generation_prompt(document: Document) -> list[int]:
    """What generation starts from: the prompt, or the beginning of a text that has none.

    Args:
        document: A document.

    Returns:
        Token ids, at least one.
    """
    length = document.prompt_length or min(_TEXT_PROMPT, len(document) // 2)
    return [int(token) for token in document.ids[: max(1, length)]]


def _exp(value: float | np.floating[npt.NBitBase]) -> float:
    """The exponential, infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(value)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
