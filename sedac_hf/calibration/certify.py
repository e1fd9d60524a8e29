"""Certify a walk of policies by the true masked forward on documents that chose nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf.calibration.bounds import (
    RiskTarget,
    TestResult,
    binomial_upper_bound,
    documents_needed,
)
from sedac_hf.calibration.certificate import Certificate, HeldOutCheck, Rung
from sedac_hf.calibration.progress import progress_bar
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.environment import software_versions
from sedac_hf.evaluation.intervals import bootstrap_ratio
from sedac_hf.evaluation.scoring import (
    DocumentScores,
    document_deltas,
    score_documents,
    split_hash,
)
from sedac_hf.evaluation.settled_scoring import score_policies
from sedac_hf.fingerprint import dtype_label

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.calibration.pareto import Policy
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["WalkResult", "certify", "walk"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WalkResult:
    """Outcome of a fixed-sequence walk.

    Attributes:
        results: Tests made, the last one failed unless all policies passed or time was up.
        accepted: How many passed; deploy the last of them.
    """

    results: tuple[TestResult, ...]
    accepted: int


def walk(
    deltas_of: Callable[[int], FloatArray],
    policies: int,
    target: RiskTarget,
    *,
    deadline: float | None = None,
) -> WalkResult:
    """Test policies in a fixed order and stop at the first that fails.

    Each test is made at the full `delta`: since the order was fixed beforehand and the walk stops
    at the first failure, the chance that any accepted policy breaks the claim is at most `delta`.

    Args:
        deltas_of: Rise of each document under the policy of an index, shape `[n]`; called lazily.
        policies: Number of policies.
        target: What is to be shown.
        deadline: `time.monotonic()` value after which no further policy is begun. Stopping early
            only makes the result safer.

    Returns:
        The tests made and how many passed.
    """
    results: list[TestResult] = []
    accepted = 0
    for index in range(policies):
        if index and deadline is not None and time.monotonic() >= deadline:
            break
        results.append(target.test(deltas_of(index)))
        if results[-1].p_value > target.delta:
            break
        accepted += 1
    return WalkResult(tuple(results), accepted)


def certify(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    policies: Sequence[Policy],
    *,
    target: RiskTarget | None = None,
    other_splits: Mapping[str, Sequence[Document]] | None = None,
    held_out: Sequence[Document] | None = None,
    batch_tokens: int | None = None,
    deadline: float | None = None,
    progress: bool = False,
) -> Certificate:
    """Walk the policies on fresh documents and record what was shown.

    Args:
        model: The wrapped model, in the data type and K/V mode it will be used in.
        documents: Certification documents, drawn from what the claim is to be about, used for
            nothing else.
        policies: Policies from the safest to the boldest, fixed before these documents were seen.
        target: Epsilon, delta, clip and tail; None means 1 %, 0.1, 0.1 nats and 5 %.
        other_splits: Splits used for training and search, by name; they must share no document with
            the certification split.
        held_out: Further documents on which the deployed policy is checked.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.
        deadline: `time.monotonic()` value after which no further policy is begun.
        progress: Show a progress bar over policies.

    Returns:
        The certificate; its `policy` is None when nothing passed, and its statement says what to
        do then.

    Raises:
        CalibrationError: If splits overlap or no document can be tested.
    """
    target = target or RiskTarget()
    splits = dict(other_splits or {}) | ({"held_out": held_out} if held_out else {})
    _refuse_overlap({"certification": documents, **splits})
    cascades = [policy.cascade for policy in policies]
    # Settled exits share one forward of the base, so all are scored at once, the walk walks after.
    settles = model.config.kv_mode == "settle"
    chosen, full, known = _testable(model, documents, cascades if settles else [], batch_tokens)
    scores: list[DocumentScores] = []
    bar = progress_bar(len(policies), "certify", " policies", shown=progress)

    def deltas_of(index: int) -> FloatArray:
        if settles:
            scores.append(known[index])
        else:
            scores.append(
                score_documents(model, chosen, cascades[index], batch_tokens=batch_tokens)
            )
        bar.update()
        return document_deltas(full, scores[-1])

    outcome = walk(deltas_of, len(policies), target, deadline=deadline)
    bar.close()
    rungs = tuple(
        Rung(policy, result, score.exit_share, score.mean_depth)
        for policy, result, score in zip(policies, outcome.results, scores, strict=False)
    )
    interval, upper, needed, check = None, None, None, None
    if outcome.accepted:
        at = outcome.accepted - 1
        interval = _interval(document_deltas(full, scores[at]))
        upper = binomial_upper_bound(rungs[at].result.beyond_clip, len(chosen), target.delta)
        if held_out:
            check = _check_held_out(model, held_out, policies[at], target, batch_tokens)
    elif scores:
        needed = documents_needed(document_deltas(full, scores[0]), target)
    certificate = Certificate(
        target=target,
        walk=rungs,
        accepted=outcome.accepted,
        documents=len(chosen),
        left_out=len(documents) - len(chosen),
        dtype=dtype_label(model),
        kv_mode=model.config.kv_mode,
        splits={"certification": split_hash(chosen)}
        | {name: split_hash(some) for name, some in splits.items()},
        interval=interval,
        tail_upper=upper,
        needed_documents=needed,
        fingerprint=model.config.fingerprint,
        held_out=check,
        versions=software_versions(),
    )
    logger.info("%s", certificate.statement())
    return certificate


def _testable(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    cascades: Sequence[CascadeConfig],
    batch_tokens: int | None,
) -> tuple[list[Document], DocumentScores, list[DocumentScores]]:
    """Documents to test on, their scores at full depth, and those under some cascades.

    What is left out is decided by the documents and the base alone, never by what exits do. The
    order is that of the hashes: as good as random, and no one can have picked it.
    """
    unique = sorted({d.hash: d for d in documents}.values(), key=lambda d: d.hash)
    if not unique:
        raise CalibrationError("there are no documents to certify on; pass at least one.")
    full, *others = score_policies(model, unique, [None, *cascades], batch_tokens=batch_tokens)
    usable = np.flatnonzero((full.steps > 0) & np.isfinite(full.nll))
    if not len(usable):
        raise CalibrationError(
            f"none of {len(unique)} documents has a token that may exit and a finite NLL under the "
            "base; use documents with at least 2 tokens beyond their prompt."
        )
    chosen = [unique[i] for i in usable]
    return chosen, full.selected(usable), [score.selected(usable) for score in others]


def _check_held_out(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    policy: Policy,
    target: RiskTarget,
    batch_tokens: int | None,
) -> HeldOutCheck | None:
    full, scores = score_policies(
        model, documents, [None, policy.cascade], batch_tokens=batch_tokens
    )
    deltas = document_deltas(full, scores)
    deltas = deltas[~np.isnan(deltas)]
    if not len(deltas):
        return None
    mean = float(deltas.mean())
    return HeldOutCheck(
        documents=len(deltas),
        mean_delta=mean if math.isfinite(mean) else None,
        interval=_interval(deltas),
        exit_share=scores.exit_share,
        holds=mean <= target.limit,
    )


def _interval(deltas: FloatArray) -> tuple[float, float] | None:
    if not np.isfinite(deltas).all():
        return None
    return bootstrap_ratio(deltas, np.ones(len(deltas)))


def _refuse_overlap(splits: Mapping[str, Sequence[Document]]) -> None:
    """Certification and held-out documents may be in no other split."""
    hashes = {name: {d.hash for d in split} for name, split in splits.items()}
    for name in ("certification", "held_out"):
        for other, seen in hashes.items():
            shared = hashes.get(name, set()) & seen if other != name else set()
            if shared:
                raise CalibrationError(
                    f"{len(shared)} of {len(hashes[name])} {name} documents are also in the split "
                    f"{other!r}; a certificate needs documents that were used for nothing else. "
                    "Deal documents with split_documents, which keeps equal ones together."
                )
