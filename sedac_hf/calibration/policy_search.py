"""Search for exit policies: thousands of threshold vectors replayed over traces, the best kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf.calibration.pareto import Policy, pareto_front, pareto_indices
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import DocumentScores, document_deltas, score_documents
from sedac_hf.evaluation.settled_scoring import score_policies

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.documents import Document
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.modeling import SedacForCausalLM

__all__ = [
    "Policy",
    "choose_policies",
    "ladder",
    "most_cost",
    "pareto_front",
    "reorder",
    "search",
    "verify",
    "with_temperatures",
]

logger = logging.getLogger(__name__)

# Expected cost up to which a policy may stand in the walk, beside what the heads need to follow a
# text; a plain pass costs 1. The governor turns off what costs more than it saves.
_MOST_COST = 1.02

FloatArray = npt.NDArray[np.float64]


def search(
    traces: Traces,
    costs: CostModel,
    *,
    epsilon: float = 0.01,
    candidates: int = 6000,
    rungs: int = 8,
    margin: float = 1.5,
    seed: int = 0,
) -> list[Policy]:
    """Find a walk of policies from the safest to the boldest by replaying traces.

    Args:
        traces: Traces of documents that are not used to certify.
        costs: What probes, tries and exits cost.
        epsilon: Perplexity increase aimed at, as a fraction.
        candidates: Threshold vectors to replay.
        rungs: Most policies to return.
        margin: The boldest policy is estimated at this multiple of the target at most, so that the
            walk has steps on both sides of it.
        seed: Seed of the random candidates.

    Returns:
        Policies by increasing estimated delta and falling cost, all cheaper than a plain pass;
        empty when no policy saves anything within the margin.

    Raises:
        CalibrationError: If no document of the traces can be used.
    """
    front = pareto_front(traces, costs, candidates=candidates, seed=seed)
    return ladder(front, epsilon=epsilon, rungs=rungs, margin=margin)


def most_cost(costs: CostModel) -> float:
    """Expected cost up to which a policy may stand in the walk.

    A policy that costs as much as it saves is no use, but may be the only one that is safe. Heads
    follow the text whoever leaves, and where that takes much no policy could ever be shown.

    Args:
        costs: What probes, tries and exits cost.
    """
    return _MOST_COST + sum(checkpoint.fill for checkpoint in costs.checkpoints)


def ladder(
    front: Sequence[Policy],
    *,
    epsilon: float = 0.01,
    rungs: int = 8,
    margin: float = 1.5,
    inflation: float = 1.0,
) -> list[Policy]:
    """Pick the cheapest policy below each of evenly spaced targets up to `margin` times the aim.

    Args:
        front: Policies by increasing estimated delta and falling cost.
        epsilon: Perplexity increase aimed at, as a fraction.
        rungs: Number of targets.
        margin: Last target, as a multiple of the aim.
        inflation: Factor by which the true delta exceeds the replayed one (K/V of exited tokens).

    Returns:
        At most `rungs` policies from the safest to the boldest, estimates inflated.
    """
    if rungs < 1 or not margin > 0 or not epsilon > 0 or not inflation > 0:
        raise CalibrationError(
            "rungs, margin, epsilon and inflation must be positive, found "
            f"{rungs}, {margin}, {epsilon}, {inflation}."
        )
    targets = math.log1p(epsilon) * margin * np.arange(1, rungs + 1) / rungs
    picked: list[Policy] = []
    for target in targets:
        below = [p for p in front if p.estimated_delta * inflation <= target]
        if not below:
            continue
        best = min(below, key=lambda p: p.cost)
        if not picked or best.cost < picked[-1].cost:
            picked.append(replace(best, estimated_delta=best.estimated_delta * inflation))
    return picked


def verify(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    policies: Sequence[Policy],
    *,
    full: DocumentScores | None = None,
    batch_tokens: int | None = None,
) -> FloatArray:
    """Per-document rise of the NLL under the true masked forward, K/V effects included.

    Args:
        model: The wrapped model.
        documents: Documents to run.
        policies: Policies to run on each of them.
        full: Scores of the documents at full depth, if they are known.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.

    Returns:
        Mean NLL per token under the policy less that at full depth, shape `[P, D]`, in nats; NaN
        for documents in which nothing can exit or the base itself gives no finite NLL.
    """
    cascades = [policy.cascade for policy in policies]
    if full is None:
        full, *scores = score_policies(
            model, documents, [None, *cascades], batch_tokens=batch_tokens
        )
    else:
        scores = score_policies(model, documents, cascades, batch_tokens=batch_tokens)
    rows = [document_deltas(full, score) for score in scores]
    return np.stack(rows) if rows else np.empty((0, len(documents)))


def reorder(policies: Sequence[Policy], deltas: FloatArray) -> list[Policy]:
    """Put verified deltas in place of the estimates, order again and drop what is beaten.

    Args:
        policies: Policies that were verified.
        deltas: Result of `verify`, shape `[P, D]`.

    Returns:
        Policies by increasing verified delta and falling cost. A policy under which a document that
        the base can score got an infinite NLL is dropped.
    """
    used = ~np.isnan(deltas).all(axis=0)
    mean = np.array([row[used].mean() if used.any() else np.nan for row in deltas])
    cost = np.array([policy.cost for policy in policies])
    order = pareto_indices(mean, cost)
    return [replace(policies[i], estimated_delta=float(mean[i])) for i in order]


def choose_policies(
    model: SedacForCausalLM,
    traces: Traces,
    documents: Sequence[Document],
    costs: CostModel,
    *,
    epsilon: float = 0.01,
    candidates: int = 6000,
    rungs: int = 8,
    margin: float = 1.5,
    temperatures: Sequence[float] | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    deadline: float | None = None,
    front: Sequence[Policy] | None = None,
) -> list[Policy]:
    """Search by replay, verify by the true forward, correct for K/V effects, and order the walk.

    A first, coarse ladder tells how much the replay underestimates; the ladder proper is spaced
    with that factor and verified again. When time is up before that, it stands unverified: the
    certificate does not rest on these estimates, only the order of its walk does.

    Args:
        model: The wrapped model.
        traces: Traces of the search split.
        documents: Documents of the search split, or some of them.
        costs: What probes, tries and exits cost.
        epsilon: Perplexity increase aimed at, as a fraction.
        candidates: Threshold vectors to replay.
        rungs: Most policies to return.
        margin: Last target, as a multiple of the aim.
        temperatures: What the logits of exits at each checkpoint are divided by; None means 1.
        seed: Seed of the random candidates.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.
        deadline: `time.monotonic()` value after which no further policy is verified.
        front: Policies to choose from, by increasing estimated delta and falling cost; None finds
            them by replay.

    Returns:
        Policies from the safest to the boldest, with verified deltas; empty when nothing saves.
    """
    if front is None:
        front = pareto_front(
            traces, costs, candidates=candidates, seed=seed, most_cost=most_cost(costs)
        )
    if temperatures is not None:
        front = [with_temperatures(policy, temperatures) for policy in front]
    coarse = ladder(front, epsilon=epsilon, rungs=3, margin=margin)
    if not coarse:
        return []
    full = score_documents(model, documents, None, batch_tokens=batch_tokens)
    seen = verify(model, documents, coarse, full=full, batch_tokens=batch_tokens)
    inflation = _inflation(coarse, seen)
    logger.info("verified deltas are %.2f times the replayed ones", inflation)
    fine = ladder(front, epsilon=epsilon, rungs=rungs, margin=margin, inflation=inflation)
    known = {policy.cascade: row for policy, row in zip(coarse, seen, strict=True)}
    for group in _verified_together(model, [p for p in fine if p.cascade not in known]):
        if deadline is not None and time.monotonic() >= deadline:
            logger.info("time is up: the walk stands on the replay and %d policies", len(known))
            return fine
        found = verify(model, documents, group, full=full, batch_tokens=batch_tokens)
        known |= {policy.cascade: row for policy, row in zip(group, found, strict=True)}
    everything = fine + [p for p in coarse if p.cascade not in {f.cascade for f in fine}]
    walk = reorder(everything, np.stack([known[p.cascade] for p in everything]))
    limit = margin * math.log1p(epsilon)
    return [policy for policy in walk if policy.estimated_delta <= limit][-rungs:]


def _verified_together(model: SedacForCausalLM, policies: list[Policy]) -> list[list[Policy]]:
    """Policies in the groups in which they are verified: settled exits share the base's forward."""
    if model.config.kv_mode == "settle":
        return [policies] if policies else []
    return [[policy] for policy in policies]


def with_temperatures(policy: Policy, temperatures: Sequence[float]) -> Policy:
    """The same policy with exits that speak at given temperatures.

    Args:
        policy: The policy.
        temperatures: What the logits of exits at each checkpoint are divided by.
    """
    layers = [
        replace(layer, temperature=temperature)
        for layer, temperature in zip(policy.cascade.layers, temperatures, strict=True)
    ]
    return replace(policy, cascade=replace(policy.cascade, layers=tuple(layers)))


def _inflation(policies: Sequence[Policy], deltas: FloatArray) -> float:
    """How many times the replayed delta the verified one is, kept between 0.5 and 10."""
    replayed = np.array([policy.estimated_delta for policy in policies])
    verified = np.nanmean(deltas, axis=1) if np.isfinite(deltas).any() else replayed
    usable = (replayed > 0) & np.isfinite(verified)
    if not usable.any():
        return 1.0
    return float(np.clip(verified[usable].sum() / replayed[usable].sum(), 0.5, 10.0))
