"""Fusion of what several estimators say of a hidden state into one risk, and one confidence.

Each estimator gives a risk that is at least 0; divided by its threshold it is comparable with the
others. The fused risk is ``sum_i g_i risk_i / threshold_i`` with weights that sum to 1: fixed ones,
or those that a small network gives each token. Confidence is ``clamp(1 - risk, 0, 1)``, which for a
lone estimator is the formula of the cascade. A risk that is NaN or infinite gives no confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedac_hf.core.estimators import (
    AttentionEntropyEstimator,
    EntropyProbeEstimator,
    Estimator,
    Observation,
    PerplexityEstimator,
    TokenConsistencyEstimator,
)
from sedac_hf.core.exit_strategy import soft_exit_mlp_scaling
from sedac_hf.errors import ConfigError

__all__ = [
    "AttentionEntropyEstimator",
    "EnhancedConfidenceAccumulator",
    "EntropyProbeEstimator",
    "Estimator",
    "GatedFusion",
    "Observation",
    "PerplexityEstimator",
    "TokenConsistencyEstimator",
    "adaptive_confidence_decay",
    "soft_exit_mlp_scaling",
]

FloatArray = npt.NDArray[np.float32]
# Bounds of a decay that adapts.
_LEAST_DECAY, _MOST_DECAY = 0.5, 0.99
# Hidden units of the network that weighs estimators.
_GATE_UNITS = 16


class GatedFusion(nn.Module):
    """A small network that weighs estimators for each token; untrained, it gives the fixed weights.

    ``g = softmax(ln w + out(tanh(hidden(features))))`` for fixed weights w, so an estimator whose
    fixed weight is 0 stays out.
    """

    def __init__(self, features: int, estimators: int, units: int = _GATE_UNITS) -> None:
        """Build the network.

        Args:
            features: Width of what it sees.
            estimators: How many it weighs.
            units: Hidden units.

        Raises:
            ConfigError: If a size is not positive.
        """
        super().__init__()
        if min(features, estimators, units) < 1:
            raise ConfigError(
                "gated fusion needs positive sizes, found "
                f"{features} features, {estimators} estimators and {units} units."
            )
        self.hidden = nn.Linear(features, units)
        self.out = nn.Linear(units, estimators)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """Weights of each token.

        Args:
            features: `[..., features]`.
            weights: Fixed weights, at least one above 0, `[estimators]`.

        Returns:
            Weights that sum to 1, `[..., estimators]`.
        """
        score = self.out(torch.tanh(self.hidden(features.to(self.hidden.weight.dtype))))
        return torch.softmax(score + weights.to(score).log(), -1)


class EnhancedConfidenceAccumulator:
    """Fuses estimators into one risk, and one confidence.

    At one checkpoint of a running model it stands behind each gate; by itself it can be asked
    layer after layer, and then remembers the states of the layer before.
    """

    def __init__(
        self,
        hidden_dim: int,
        use_gated_fusion: bool = False,
        *,
        gate: GatedFusion | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Begin without estimators.

        Args:
            hidden_dim: Width of the states.
            use_gated_fusion: Whether a network weighs the estimators for each token.
            gate: A trained network; None makes one, which gives the fixed weights until trained.
            features: What the network is shown of the states; None shows them as they are.

        Raises:
            ConfigError: If `hidden_dim` is not positive.
        """
        if hidden_dim < 1:
            raise ConfigError(f"hidden_dim must be positive, found {hidden_dim}.")
        self.hidden_dim = hidden_dim
        self.use_gated_fusion = use_gated_fusion
        self.gate = gate
        self._features = features
        self._estimators: list[Estimator] = []
        self._weights: list[float] = []
        self._last: tuple[int, Tensor] | None = None

    @property
    def estimators(self) -> tuple[Estimator, ...]:
        """The estimators, in the order in which they were added."""
        return tuple(self._estimators)

    @property
    def weights(self) -> tuple[float, ...]:
        """Their fixed weights, which sum to 1."""
        total = sum(self._weights)
        return tuple(weight / total for weight in self._weights)

    def add_estimator(self, estimator: Estimator, weight: float = 1.0) -> None:
        """Take in an estimator.

        Args:
            estimator: The estimator.
            weight: Its weight beside the others', above 0.

        Raises:
            ConfigError: If the weight is not a finite number above 0.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"the weight of {estimator.name!r} must be a finite number above 0, found "
                f"{weight!r}; leave an estimator out to give it none."
            )
        self._estimators.append(estimator)
        self._weights.append(float(weight))

    def risk_of(self, risks: Sequence[Tensor], states: Tensor) -> Tensor:
        """Fuse risks that are known.

        Args:
            risks: One tensor `[...]` for each estimator, in their order.
            states: The tokens' states, `[..., width]`; looked at by a gate alone.

        Returns:
            The fused risk, `[...]`; NaN where one of them is.
        """
        if not risks or len(risks) != len(self._estimators):
            raise ConfigError(
                f"expected a risk for each of {len(self._estimators)} estimators and at least "
                f"one, found {len(risks)}. Add estimators first."
            )
        kind = torch.float64 if states.device.type == "cpu" else torch.float32
        scaled = torch.stack(
            [
                risk.to(states.device, kind) / estimator.threshold
                for risk, estimator in zip(risks, self._estimators, strict=True)
            ],
            dim=-1,
        )
        weights: Tensor = torch.tensor(self.weights, dtype=kind, device=states.device)
        if self.use_gated_fusion and len(risks) > 1:
            shown = states.to(kind) if self._features is None else self._features(states)
            if self.gate is None or self.gate.out.out_features != len(risks):
                self.gate = GatedFusion(shown.shape[-1], len(risks)).to(states.device)
            weights = self.gate(shown, weights).to(kind)
        return (scaled * weights).sum(-1)

    def compute_risk(self, seen: Observation) -> Tensor:
        """The fused risk of some tokens.

        Args:
            seen: What there is to see.

        Returns:
            Risks, `[...]`, at least 0; NaN where an estimator cannot tell.
        """
        return self.risk_of([each.risk(seen) for each in self._estimators], seen.states)

    @torch.no_grad()
    def compute_confidence(
        self,
        hidden_states: Tensor,
        layer_idx: int,
        *,
        probability: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> Tensor:
        """How sure one can be of some tokens after a layer.

        Ask in the order of the layers: each call has the states of the one before, as far as the
        shape is the same. A layer that is not deeper begins anew.

        Args:
            hidden_states: States after the layer, `[..., hidden_dim]`.
            layer_idx: The layer.
            probability: Probability of the exit's own first choice, `[...]`, where it is known.
            attention: Attention weights, `[..., heads, keys]`, where they are known.

        Returns:
            Confidence in [0, 1], `[...]`, float32; 0 where a risk is NaN or infinite.

        Raises:
            ConfigError: If there are no estimators, or the states have another width.
        """
        if hidden_states.shape[-1:] != (self.hidden_dim,):
            raise ConfigError(
                f"states must be {self.hidden_dim} wide (hidden_dim), found shape "
                f"{tuple(hidden_states.shape)}."
            )
        before = None
        if self._last is not None and self._last[0] < layer_idx:
            before = self._last[1] if self._last[1].shape == hidden_states.shape else None
        self._last = (layer_idx, hidden_states)
        risk = self.compute_risk(Observation(hidden_states, before, probability, attention))
        confidence = (1.0 - risk).clamp(0.0, 1.0)
        return torch.where(torch.isfinite(risk), confidence, torch.zeros_like(risk)).float()


@overload
def adaptive_confidence_decay(
    gamma_base: float, uncertainty: float, historical_success_bonus: float = 0.0
) -> float: ...
@overload
def adaptive_confidence_decay(
    gamma_base: float, uncertainty: FloatArray, historical_success_bonus: FloatArray | float = 0.0
) -> FloatArray: ...
def adaptive_confidence_decay(
    gamma_base: float, uncertainty: Any, historical_success_bonus: Any = 0.0
) -> Any:
    """Share of the earlier confidence that is kept, by how hard the text has been so far.

    ``clamp(gamma_base (1 - uncertainty) (1 + historical_success_bonus), 0.5, 0.99)`` in float32.

    Args:
        gamma_base: The decay of the rule.
        uncertainty: How hard the text is, in [0, 1]; a number, or one a row.
        historical_success_bonus: What exits that went well add, at least 0.

    Returns:
        The decay: a number for numbers, `[rows]` for arrays; NaN where an argument is.
    """
    one = np.float32(1)
    easy = one - np.asarray(uncertainty, np.float32)
    bonus = one + np.asarray(historical_success_bonus, np.float32)
    found = np.clip(np.float32(gamma_base) * easy * bonus, _LEAST_DECAY, _MOST_DECAY)
    return float(found) if np.ndim(found) == 0 else found.astype(np.float32)
