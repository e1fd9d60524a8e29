"""Estimators: each says, by one kind of evidence, how risky it is to let tokens leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from sedac_hf.errors import ConfigError

__all__ = [
    "AttentionEntropyEstimator",
    "EntropyProbeEstimator",
    "Estimator",
    "Observation",
    "PerplexityEstimator",
    "TokenConsistencyEstimator",
]


@dataclass(frozen=True)
class Observation:
    """What there is to see of some tokens at one checkpoint.

    Attributes:
        states: Hidden states, `[..., width]`.
        before: States of the same tokens at the checkpoint before, same shape; None where there is
            none.
        probability: Probability that the exit gives to its own first choice, `[...]`; None where
            the exit was not asked.
        attention: Attention weights of the tokens, `[..., heads, keys]`; None where they are not
            known.
        spread: What `AttentionEntropyEstimator` makes of such weights, `[...]`, where something
            else has worked it out, as `Spread` does; None where nothing has.
    """

    states: Tensor
    before: Tensor | None = None
    probability: Tensor | None = None
    attention: Tensor | None = None
    spread: Tensor | None = None

    def unknown(self) -> Tensor:
        """NaN for each token."""
        return torch.full(
            self.states.shape[:-1], math.nan, dtype=self.precision, device=self.states.device
        )

    @property
    def precision(self) -> torch.dtype:
        """Type to compute in: float64 on a CPU, float32 elsewhere."""
        # Twice as exact as needed, a row's rounded result does not depend on the rows beside it.
        return torch.float64 if self.states.device.type == "cpu" else torch.float32


class Estimator(Protocol):
    """Says how risky it is to let tokens leave.

    Attributes:
        threshold: Risk at and above which there is no confidence.
    """

    name: ClassVar[str]
    threshold: float

    def risk(self, seen: Observation) -> Tensor:
        """Risk of each token, `[...]`, at least 0; NaN where it cannot be told."""
        ...


class EntropyProbeEstimator:
    """What a probe reads from the state itself."""

    name: ClassVar[str] = "entropy"

    def __init__(
        self,
        probe: nn.Module,
        threshold: float = 1.0,
        *,
        native: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Use a probe.

        Args:
            probe: States `[..., width]` to risks `[...]`, such as `LREProbe`.
            threshold: Risk at and above which there is no confidence.
            native: The same on a CPU, faster.
        """
        self.probe = probe
        self.threshold = _checked(self.name, threshold)
        self._native = native

    def risk(self, seen: Observation) -> Tensor:
        """The probe's risk, `[...]`."""
        if self._native is not None and seen.states.device.type == "cpu":
            return self._native(seen.states)
        return cast(Tensor, self.probe(seen.states))


class PerplexityEstimator(nn.Module):
    """How unsure the exit is of its own first choice: ``-ln p``, the logarithm of a perplexity."""

    name: ClassVar[str] = "perplexity"

    def __init__(
        self,
        hidden_dim: int,
        vocab_size: int,
        threshold: float = 1.0,
        *,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Judge by an exit's own distribution.

        Args:
            hidden_dim: Width of the states.
            vocab_size: Words that the exit can say.
            threshold: Risk in nats at and above which there is no confidence.
            head: States `[..., hidden_dim]` to logits `[..., vocab_size]`; None makes an untrained
                linear map when it is first needed. Not asked where the probability is known.
        """
        super().__init__()
        if hidden_dim < 1 or vocab_size < 2:
            raise ConfigError(
                "a perplexity needs a positive hidden_dim and a vocab_size of at least 2, found "
                f"{hidden_dim} and {vocab_size}."
            )
        self.hidden_dim, self.vocab_size = hidden_dim, vocab_size
        self.threshold = _checked(self.name, threshold)
        self._head = head

    def risk(self, seen: Observation) -> Tensor:
        """``-ln p`` of the first choice, `[...]`."""
        probability = seen.probability
        if probability is None:
            if self._head is None:
                linear = nn.Linear(self.hidden_dim, self.vocab_size, bias=False)
                self._head = linear.to(seen.states.device)
            logits = self._head(seen.states.float())
            if logits.shape[-1] != self.vocab_size:
                raise ConfigError(
                    f"the head gives {logits.shape[-1]} logits, expected vocab_size "
                    f"{self.vocab_size}."
                )
            return -torch.log_softmax(logits.to(seen.precision), -1).amax(-1)
        return -probability.to(seen.precision).log()


class AttentionEntropyEstimator:
    """How evenly a token's attention is spread: its entropy as a share of the greatest possible."""

    name: ClassVar[str] = "attention"

    def __init__(self, threshold: float = 1.0) -> None:
        """Judge by attention weights.

        Args:
            threshold: Share at and above which there is no confidence.
        """
        self.threshold = _checked(self.name, threshold)

    def risk(self, seen: Observation) -> Tensor:
        """Mean over heads of ``H(attention) / ln(keys)``, `[...]`; NaN without attention."""
        if seen.spread is not None:
            return seen.spread.to(seen.states.device, seen.precision)
        if seen.attention is None:
            return seen.unknown()
        weights = seen.attention.to(seen.precision)
        # Keys that are masked have weight 0 and count for nothing; a lone key is no spread.
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        keys = (weights > 0).sum(-1).clamp_min(2).to(weights.dtype)
        return cast(Tensor, (entropy / keys.log()).mean(-1))


class TokenConsistencyEstimator:
    """How much a token's state has turned since the checkpoint before: ``1 - cosine``."""

    name: ClassVar[str] = "consistency"

    def __init__(self, threshold: float = 1.0) -> None:
        """Judge by two successive checkpoints.

        Args:
            threshold: Turn at and above which there is no confidence; opposite states have 2.
        """
        self.threshold = _checked(self.name, threshold)

    def risk(self, seen: Observation) -> Tensor:
        """``1 - cos(state, state before)``, `[...]`; NaN without a checkpoint before."""
        if seen.before is None:
            return seen.unknown()
        now, before = seen.states.to(seen.precision), seen.before.to(seen.precision)
        before = before.to(now.device)
        length = now.square().sum(-1) * before.square().sum(-1)
        return 1.0 - ((now * before).sum(-1) * length.rsqrt()).clamp(-1.0, 1.0)


def _checked(name: str, threshold: float) -> float:
    if not (math.isfinite(threshold) and threshold > 0):
        raise ConfigError(
            f"the threshold of {name!r} must be a finite number above 0, found {threshold!r}."
        )
    return float(threshold)
