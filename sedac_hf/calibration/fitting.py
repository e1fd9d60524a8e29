"""`fit`: from a base model to a certified artefact, in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.documents import Document, encode_texts
from sedac_hf.calibration.fit_settings import FitReport, FitSettings
from sedac_hf.calibration.fit_splits import split_for_fit
from sedac_hf.calibration.fit_stages import FitRun
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["FitReport", "FitSettings", "fit"]


def fit(
    base: PreTrainedModel,
    texts: Iterable[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    train_texts: Iterable[str] | None = None,
    output_dir: str | Path,
    settings: FitSettings | None = None,
    progress: bool = True,
) -> tuple[SedacForCausalLM, FitReport]:
    """Fit exits to a frozen base: texts, heads, probes, policy, certificate, card.

    A run that was interrupted goes on where it was when called again with the same arguments. With
    a larger budget, heads are trained further on the same documents, and what follows is done anew.
    Under `accelerate launch` the processes share the writing and recording of texts and the
    training of heads; the main one does the rest.

    Args:
        base: The base model; it is not changed.
        texts: Plain texts; None lets the base write its own.
        tokenizer: The base's tokenizer; saved with the artefact.
        train_texts: Further texts, on which heads are trained and nothing is chosen or tested.
        output_dir: Where the artefact goes.
        settings: What to do; None means the defaults.
        progress: Show progress bars.

    Returns:
        The wrapped base with the fitted exits, and the report.

    Raises:
        CalibrationError: If there are too few texts, or training fails.
        ConfigError: If a checkpoint leaves nothing to skip, or no further text is long enough.
    """
    settings = settings or FitSettings()
    started = time.monotonic()
    target = RiskTarget(epsilon=settings.epsilon, delta=settings.delta)
    output = Path(output_dir)
    run = FitRun(base, tokenizer, settings, output, texts is None, progress, started)
    more = _further_documents(train_texts, tokenizer, settings.max_length)
    documents = run.documents(texts)
    splits = split_for_fit(documents, settings.seed, more)
    states = run.states(splits)
    heads = run.heads(states, splits)
    if not run.process.is_main_process:
        return run.taken_over(output)
    with run.threads_of_all():
        model = run.thresholds(states, splits, heads)
        certificate = run.certificate(model, splits, target)
    # Whatever was certified, drafting changes no token.
    model.config.mode = "exact"
    model.save_pretrained(
        output,
        tokenizer=tokenizer,
        certificate=certificate,
        results={"fit": run.report.to_dict()},
    )
    run.workspace.save_report(run.report)
    run.process.wait_for_everyone()
    return model, run.report


def _further_documents(
    texts: Iterable[str] | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Document]:
    """Texts for heads alone as documents; none of them long enough is a mistake."""
    given = list(texts or ())
    found = list(encode_texts(given, tokenizer, max_length=max_length))
    if given and not found:
        raise ConfigError(
            f"none of the {len(given)} further texts to train heads on (train_texts, "
            "--train-data) has the 16 tokens that a document needs; give longer texts, or none."
        )
    return found
