"""Search for exit policies: thousands of threshold vectors replayed over traces, the best kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sedac_hf import _core
from sedac_hf.calibration.candidates import PolicyVectors, perturbed, random_policies, structured
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import document_deltas, score_documents

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.documents import Document
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["Policy", "choose_policies", "ladder", "pareto_front", "reorder", "search", "verify"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
# Policies with their estimated delta, exit share and cost.
_Scored: TypeAlias = tuple[PolicyVectors, FloatArray, FloatArray, FloatArray]

# Policies replayed in one call: bounds the result to chunk x documents floats.
_CHUNK = 256


@dataclass(frozen=True)
class Policy:
    """One way to exit, and what is expected of it.

    Attributes:
        cascade: Thresholds of all checkpoints.
        estimated_delta: Estimated rise of the mean NLL per token over documents, in nats.
        exit_share: Share of the decode steps that leave early.
        cost: Expected cost of a decode step; a plain pass costs 1.
    """

    cascade: CascadeConfig
    estimated_delta: float
    exit_share: float
    cost: float

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain JSON values."""
        return {
            "layers": [asdict(layer) for layer in self.cascade.layers],
            "strategy": self.cascade.strategy,
            "estimated_delta": self.estimated_delta,
            "exit_share": self.exit_share,
            "cost": self.cost,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        """Inverse of `to_dict`.

        Args:
            values: What `to_dict` gave.

        Returns:
            The policy.
        """
        layers = tuple(LayerConfig(**layer) for layer in values["layers"])
        return cls(
            CascadeConfig(layers, strategy=values["strategy"]),
            estimated_delta=float(values["estimated_delta"]),
            exit_share=float(values["exit_share"]),
            cost=float(values["cost"]),
        )


def search(
    traces: Traces,
    costs: CostModel,
    *,
    epsilon: float = 0.01,
    candidates: int = 6000,
    rungs: int = 10,
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


def pareto_front(
    traces: Traces, costs: CostModel, *, candidates: int = 6000, seed: int = 0
) -> list[Policy]:
    """Replay structured, random and refined candidates and keep those that nothing beats.

    Args:
        traces: Traces of documents that are not used to certify.
        costs: What probes, tries and exits cost.
        candidates: Threshold vectors to replay.
        seed: Seed of the random candidates.

    Returns:
        The Pareto front of (cost, estimated delta), by increasing delta, costs below 1 only.

    Raises:
        CalibrationError: If no document can be used or the costs belong to other checkpoints.
    """
    expected = tuple(c.layer_idx for c in costs.checkpoints)
    if tuple(traces.checkpoints) != expected:
        raise CalibrationError(
            f"the traces are of checkpoints {tuple(traces.checkpoints)}, the costs of {expected}; "
            "make both from the same artefact."
        )
    usable = _usable_documents(traces)
    rng = np.random.default_rng(seed)
    kept = _evaluate(structured(traces), traces, costs, usable)
    rounds = 3
    size = max(1, candidates // rounds)
    for step in range(rounds):
        # The first round looks everywhere, the later ones around what was best so far.
        blind = step == 0 or len(kept[0]) == 0
        fresh = random_policies(traces, size, rng) if blind else perturbed(kept[0], size, rng)
        kept = _merged(kept, _evaluate(fresh, traces, costs, usable))
    vectors, delta, share, cost = kept
    return [
        Policy(
            vectors.cascade(i, traces.checkpoints), float(delta[i]), float(share[i]), float(cost[i])
        )
        for i in range(len(vectors))
    ]


def ladder(
    front: Sequence[Policy],
    *,
    epsilon: float = 0.01,
    rungs: int = 10,
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
    batch_tokens: int | None = None,
) -> FloatArray:
    """Per-document rise of the NLL under the true masked forward, K/V effects included.

    Args:
        model: The wrapped model.
        documents: Documents to run.
        policies: Policies to run on each of them.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.

    Returns:
        Mean NLL per token under the policy less that at full depth, shape `[P, D]`, in nats; NaN
        for documents in which nothing can exit or the base itself gives no finite NLL.
    """
    full = score_documents(model, documents, None, batch_tokens=batch_tokens)
    rows = [
        document_deltas(
            full, score_documents(model, documents, policy.cascade, batch_tokens=batch_tokens)
        )
        for policy in policies
    ]
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
    order = _front(mean, cost)
    return [replace(policies[i], estimated_delta=float(mean[i])) for i in order]


def choose_policies(
    model: SedacForCausalLM,
    traces: Traces,
    documents: Sequence[Document],
    costs: CostModel,
    *,
    epsilon: float = 0.01,
    candidates: int = 6000,
    rungs: int = 10,
    margin: float = 1.5,
    temperatures: Sequence[float] | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> list[Policy]:
    """Search by replay, verify by the true forward, correct for K/V effects, and order the walk.

    A first, coarse ladder tells how much the replay underestimates; the ladder proper is spaced
    with that factor and verified again.

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

    Returns:
        Policies from the safest to the boldest, with verified deltas; empty when nothing saves.
    """
    front = pareto_front(traces, costs, candidates=candidates, seed=seed)
    if temperatures is not None:
        front = [_with_temperatures(policy, temperatures) for policy in front]
    coarse = ladder(front, epsilon=epsilon, rungs=3, margin=margin)
    if not coarse:
        return []
    seen = verify(model, documents, coarse, batch_tokens=batch_tokens)
    inflation = _inflation(coarse, seen)
    logger.info("verified deltas are %.2f times the replayed ones", inflation)
    fine = ladder(front, epsilon=epsilon, rungs=rungs, margin=margin, inflation=inflation)
    known = {policy.cascade: row for policy, row in zip(coarse, seen, strict=True)}
    fresh = [policy for policy in fine if policy.cascade not in known]
    rows = verify(model, documents, fresh, batch_tokens=batch_tokens)
    known |= {policy.cascade: row for policy, row in zip(fresh, rows, strict=True)}
    everything = fine + [p for p in coarse if p.cascade not in {f.cascade for f in fine}]
    walk = reorder(everything, np.stack([known[p.cascade] for p in everything]))
    limit = margin * math.log1p(epsilon)
    return [policy for policy in walk if policy.estimated_delta <= limit][-rungs:]


def _with_temperatures(policy: Policy, temperatures: Sequence[float]) -> Policy:
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


def _usable_documents(traces: Traces) -> npt.NDArray[np.bool_]:
    """Documents in which something can exit and the base's own NLL is finite, shape `[D]`."""
    offsets = np.asarray(traces.doc_offsets)

    def count(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        total = np.concatenate([[0], np.cumsum(mask)])
        return np.asarray(total[offsets[1:]] - total[offsets[:-1]], dtype=np.int64)

    usable: npt.NDArray[np.bool_] = count(traces.eligible) > 0
    usable &= count(~np.isfinite(traces.nll_full)) == 0
    if not usable.any():
        raise CalibrationError(
            f"none of {len(usable)} traced documents has a token that may exit and a finite NLL; "
            "use documents of several tokens beyond their prompt."
        )
    return usable


def _merged(kept: _Scored, more: _Scored) -> _Scored:
    """The Pareto front of two sets of scored policies."""
    vectors = kept[0].concatenated(more[0])
    delta, share, cost = (np.concatenate(pair) for pair in zip(kept[1:], more[1:], strict=True))
    best = _front(delta, cost)
    return vectors.selected(best), delta[best], share[best], cost[best]


def _evaluate(
    vectors: PolicyVectors, traces: Traces, costs: CostModel, usable: npt.NDArray[np.bool_]
) -> _Scored:
    """Replay policies; drop those that save nothing or whose delta is not finite."""
    delta, share, cost = (np.empty(len(vectors)) for _ in range(3))
    tokens = int(np.count_nonzero(traces.eligible))
    for part in _chunks(len(vectors)):
        some = vectors.selected(part)
        out = _core.replay(
            traces.risk,
            traces.probability,
            traces.delta_nll,
            traces.eligible,
            traces.doc_offsets,
            some.tau,
            some.weight,
            some.gamma,
            some.exit_confidence,
            some.min_probability,
        )
        delta[part] = out["doc_delta"][:, usable].mean(axis=1, dtype=np.float64)
        share[part] = out["exits"].sum(axis=1) / tokens
        cost[part] = costs.expected(out["exits"], out["tries"], some.min_probability > 0, tokens)
    good = np.flatnonzero(np.isfinite(delta) & (cost < 1.0) & (share > 0.0))
    return vectors.selected(good), delta[good], share[good], cost[good]


def _chunks(size: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, size, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, size))


def _front(delta: FloatArray, cost: FloatArray) -> npt.NDArray[np.int64]:
    """Indices of the points that no other beats in both, by increasing delta."""
    finite = np.flatnonzero(np.isfinite(delta))
    order = finite[np.lexsort((cost[finite], delta[finite]))]
    lowest = np.minimum.accumulate(cost[order]) if len(order) else cost[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = lowest[1:] < lowest[:-1]
    return np.asarray(order[first], dtype=np.int64)
