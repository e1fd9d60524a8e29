"""Replay of thousands of policies over traces, and those that nothing beats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sedac_hf import _core
from sedac_hf.calibration.candidates import PolicyVectors, perturbed, random_policies, structured
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.core.cascade_options import option_values, options_from
from sedac_hf.core.exit_strategy import DEFAULT_STEEPNESS
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.traces import Traces

__all__ = [
    "History",
    "Policy",
    "pareto_front",
    "pareto_indices",
    "replayed",
    "usable_documents",
]

FloatArray = npt.NDArray[np.float64]
# Entropy of full depth at each token, its scale, the bonus and the momentum of an adaptive decay.
History: TypeAlias = tuple[npt.NDArray[np.float32], float, float, float]
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
        options = option_values(self.cascade)
        return {
            "layers": [asdict(layer) for layer in self.cascade.layers],
            "strategy": self.cascade.strategy,
            "steepness": self.cascade.steepness,
            **({"options": options} if options else {}),
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
        options = {n: torch.tensor(value) for n, value in values.get("options", {}).items()}
        return cls(
            CascadeConfig(
                layers,
                strategy=values["strategy"],
                # Earlier versions knew hard exits alone, and no steepness.
                steepness=float(values.get("steepness", DEFAULT_STEEPNESS)),
                **options_from(options),
            ),
            estimated_delta=float(values["estimated_delta"]),
            exit_share=float(values["exit_share"]),
            cost=float(values["cost"]),
        )


def pareto_front(
    traces: Traces,
    costs: CostModel,
    *,
    candidates: int = 6000,
    seed: int = 0,
    most_cost: float = 1.0,
    history: History | None = None,
) -> list[Policy]:
    """Replay structured, random and refined candidates and keep those that nothing beats.

    Args:
        traces: Traces of documents that are not used to certify.
        costs: What probes, tries and exits cost.
        candidates: Threshold vectors to replay.
        seed: Seed of the random candidates.
        most_cost: Only policies that cost less are kept; a plain pass costs 1.
        history: What decays follow, as `replay` of the core takes it; None keeps them as they are.

    Returns:
        The Pareto front of (cost, estimated delta), by increasing delta.

    Raises:
        CalibrationError: If no document can be used or the costs belong to other checkpoints.
    """
    expected = tuple(c.layer_idx for c in costs.checkpoints)
    if tuple(traces.checkpoints) != expected:
        raise CalibrationError(
            f"the traces are of checkpoints {tuple(traces.checkpoints)}, the costs of {expected}; "
            "make both from the same artefact."
        )
    usable = usable_documents(traces)
    rng = np.random.default_rng(seed)
    kept = _evaluate(structured(traces), traces, costs, usable, most_cost, history)
    rounds = 3
    size = max(1, candidates // rounds)
    for step in range(rounds):
        # The first round looks everywhere, the later ones around what was best so far.
        blind = step == 0 or len(kept[0]) == 0
        fresh = random_policies(traces, size, rng) if blind else perturbed(kept[0], size, rng)
        kept = _merged(kept, _evaluate(fresh, traces, costs, usable, most_cost, history))
    vectors, delta, share, cost = kept
    return [
        Policy(
            vectors.cascade(i, traces.checkpoints), float(delta[i]), float(share[i]), float(cost[i])
        )
        for i in range(len(vectors))
    ]


def usable_documents(traces: Traces) -> npt.NDArray[np.bool_]:
    """Documents in which something can exit and the base's own NLL is finite, shape `[D]`.

    Args:
        traces: The traces.

    Raises:
        CalibrationError: If there is none.
    """
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
    """The Pareto front of two sets of scored policies, those without a finite delta left out."""
    vectors = kept[0].concatenated(more[0])
    delta, share, cost = (np.concatenate(pair) for pair in zip(kept[1:], more[1:], strict=True))
    best = pareto_indices(delta, cost)
    return vectors.selected(best), delta[best], share[best], cost[best]


def _evaluate(
    vectors: PolicyVectors,
    traces: Traces,
    costs: CostModel,
    usable: npt.NDArray[np.bool_],
    most_cost: float,
    history: History | None,
) -> _Scored:
    """Replay policies and drop those that let nothing leave or cost too much."""
    delta, share, cost = replayed(vectors, traces, costs, usable, history)
    good = np.flatnonzero((cost < most_cost) & (share > 0.0))
    return vectors.selected(good), delta[good], share[good], cost[good]


def replayed(
    vectors: PolicyVectors,
    traces: Traces,
    costs: CostModel,
    usable: npt.NDArray[np.bool_],
    history: History | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What policies come to on traces.

    Args:
        vectors: P policies.
        traces: The traces.
        costs: What probes, tries and exits cost.
        usable: Documents that count for the delta, ``[D]``.
        history: As for `pareto_front`.

    Returns:
        Mean delta, share of the decode steps that leave, and cost, ``[P]`` each.
    """
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
            history,
        )
        delta[part] = out["doc_delta"][:, usable].mean(axis=1, dtype=np.float64)
        share[part] = out["exits"].sum(axis=1) / tokens
        cost[part] = costs.expected(out["exits"], out["tries"], some.min_probability > 0, tokens)
    return delta, share, cost


def _chunks(size: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, size, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, size))


def pareto_indices(delta: FloatArray, cost: FloatArray) -> npt.NDArray[np.int64]:
    """Points that no other beats in both figures.

    Args:
        delta: First figure, shape `[P]`; points where it is not finite are left out.
        cost: Second figure, shape `[P]`.

    Returns:
        Indices by increasing delta and falling cost.
    """
    finite = np.flatnonzero(np.isfinite(delta))
    order = finite[np.lexsort((cost[finite], delta[finite]))]
    lowest = np.minimum.accumulate(cost[order]) if len(order) else cost[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = lowest[1:] < lowest[:-1]
    return np.asarray(order[first], dtype=np.int64)
