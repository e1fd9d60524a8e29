"""Candidate threshold vectors for the policy search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig

if TYPE_CHECKING:
    from sedac_hf.calibration.traces import Traces

__all__ = ["PolicyVectors", "perturbed", "random_policies", "structured"]

Float32Array = npt.NDArray[np.float32]

# The threshold and the confidence that it must give are one degree of freedom at a lone checkpoint,
# so the confidence stays fixed and the threshold moves.
_EXIT_CONFIDENCE = 0.5
_DECAYS = (0.0, 0.5, 0.9)
_WEIGHTS = (0.5, 1.0, 2.0)
# A checkpoint that never tries: no confidence reaches 2. Its small weight leaves the confidence
# that is handed on as it was.
_CLOSED_CONFIDENCE = 2.0
_CLOSED_WEIGHT = 1e-3
_RISK_GRID = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
_LEAVING_GRID = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class PolicyVectors:
    """Parameters of P policies at K checkpoints, each array `[P, K]` in float32."""

    tau: Float32Array
    weight: Float32Array
    gamma: Float32Array
    exit_confidence: Float32Array
    min_probability: Float32Array

    def __len__(self) -> int:
        """Number of policies."""
        return len(self.tau)

    def selected(self, index: npt.NDArray[np.int64]) -> PolicyVectors:
        """The policies at `index`, in its order."""
        return PolicyVectors(*(np.ascontiguousarray(a[index]) for a in self._arrays()))

    def concatenated(self, other: PolicyVectors) -> PolicyVectors:
        """These policies followed by others."""
        pairs = zip(self._arrays(), other._arrays(), strict=True)
        return PolicyVectors(*(np.concatenate(pair) for pair in pairs))

    def cascade(self, index: int, checkpoints: Sequence[int]) -> CascadeConfig:
        """One policy as a cascade; float32 values, so that storing it changes nothing.

        Args:
            index: Which policy.
            checkpoints: Layers of the checkpoints.

        Returns:
            The cascade.
        """
        return CascadeConfig(
            tuple(
                LayerConfig(
                    layer_idx=int(layer),
                    threshold=float(self.tau[index, k]),
                    weight=float(self.weight[index, k]),
                    decay=float(self.gamma[index, k]),
                    exit_confidence=float(self.exit_confidence[index, k]),
                    min_probability=float(self.min_probability[index, k]),
                )
                for k, layer in enumerate(checkpoints)
            )
        )

    @classmethod
    def of(cls, cascades: Sequence[CascadeConfig]) -> PolicyVectors:
        """The parameters of some cascades of the same checkpoints, at least one.

        Args:
            cascades: The cascades.
        """
        names = ("threshold", "weight", "decay", "exit_confidence", "min_probability")
        return cls(*(np.stack([each.array(name) for each in cascades]) for name in names))

    def _arrays(self) -> tuple[Float32Array, ...]:
        return (self.tau, self.weight, self.gamma, self.exit_confidence, self.min_probability)


def structured(traces: Traces) -> PolicyVectors:
    """A grid over one checkpoint at a time, and over all of them with the same quantiles.

    Args:
        traces: Traces whose quantiles the grid is made of.

    Returns:
        `(K + 1)` grids (one when K is 1) of risk quantile times share above the least probability.
    """
    count = len(traces.checkpoints)
    pairs = [(q, s) for q in _RISK_GRID for s in (*_LEAVING_GRID, 1.0) if min(q, s) < 1.0]
    masks = [np.arange(count) == k for k in range(count)]
    if count > 1:
        masks.append(np.ones(count, dtype=bool))
    risk = np.array([[q] * count for _ in masks for q, _ in pairs])
    leaving = np.array([[s] * count for _ in masks for _, s in pairs])
    active = np.array([mask for mask in masks for _ in pairs])
    gamma = np.zeros((len(risk), count))
    return _from_quantiles(traces, risk, leaving, gamma, np.ones_like(gamma), active)


def random_policies(traces: Traces, size: int, rng: np.random.Generator) -> PolicyVectors:
    """Draw policies: quantiles of risk and probability, decay, weights, which checkpoints are open.

    Args:
        traces: Traces whose quantiles are used.
        size: Number of policies.
        rng: Source of the draw.

    Returns:
        The policies.
    """
    shape = (size, len(traces.checkpoints))
    active = rng.random(shape) < 0.7
    active[np.arange(size), rng.integers(shape[1], size=size)] = True
    risk = np.where(rng.random(shape) < 0.25, 1.0, rng.random(shape))
    leaving = np.where(rng.random(shape) < 0.15, 1.0, 10.0 ** rng.uniform(-3.0, -0.1, shape))
    gamma = np.repeat(rng.choice(_DECAYS, (size, 1)), shape[1], axis=1)
    weight = rng.choice(_WEIGHTS, shape)
    return _from_quantiles(traces, risk, leaving, gamma, weight, active)


def perturbed(front: PolicyVectors, size: int, rng: np.random.Generator) -> PolicyVectors:
    """Draw policies near given ones.

    Args:
        front: Policies to start from.
        size: Number of policies to draw.
        rng: Source of the draw.

    Returns:
        The policies.
    """
    parents = front.selected(rng.integers(len(front), size=size))
    shape = parents.tau.shape

    def factor(sigma: float) -> npt.NDArray[np.float64]:
        # Half of the values stay, so that single parameters are also tried alone.
        return np.where(rng.random(shape) < 0.5, 1.0, np.exp(rng.normal(0.0, sigma, shape)))

    gated = parents.min_probability > 0
    gap = np.clip((1.0 - parents.min_probability) * factor(0.3), 0.0, 1.0)
    return PolicyVectors(
        tau=(parents.tau * factor(0.25)).astype(np.float32),
        weight=parents.weight,
        gamma=np.clip(parents.gamma * factor(0.2), 0.0, 0.99).astype(np.float32),
        exit_confidence=parents.exit_confidence,
        min_probability=np.where(gated, 1.0 - gap, 0.0).astype(np.float32),
    )


def _from_quantiles(
    traces: Traces,
    risk: npt.NDArray[np.float64],
    leaving: npt.NDArray[np.float64],
    gamma: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    active: npt.NDArray[np.bool_],
) -> PolicyVectors:
    """Turn quantiles into thresholds. A share of 1 above the least probability means no gate."""
    tau, least = np.empty(risk.shape), np.empty(risk.shape)
    for k in range(risk.shape[1]):
        risks, probabilities = traces.risk[:, k], traces.probability[:, k]
        # Where no value is finite: a threshold of 0, or a least probability of 1, which never exit.
        tau[:, k] = _quantile(risks[traces.eligible], risk[:, k], 0.0) / (1 - _EXIT_CONFIDENCE)
        least[:, k] = _quantile(probabilities[traces.eligible], 1.0 - leaving[:, k], 1.0)
    least = np.where(leaving >= 1.0, 0.0, np.clip(least, 0.0, 1.0))
    return PolicyVectors(
        tau=np.where(active, tau, 0.0).astype(np.float32),
        weight=np.where(active, weight, _CLOSED_WEIGHT).astype(np.float32),
        gamma=gamma.astype(np.float32),
        exit_confidence=np.where(active, _EXIT_CONFIDENCE, _CLOSED_CONFIDENCE).astype(np.float32),
        min_probability=least.astype(np.float32),
    )


def _quantile(
    values: npt.NDArray[np.float32], q: npt.NDArray[np.float64], default: float
) -> npt.NDArray[np.float64]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.full_like(q, default)
    return np.asarray(np.quantile(finite, q), dtype=np.float64)
