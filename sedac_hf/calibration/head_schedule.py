"""How long and how fast exit heads are trained, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["HeadReport", "HeadSchedule", "head_learning_rate"]


@dataclass(frozen=True)
class HeadSchedule:
    """How long and how fast a head is trained.

    Attributes:
        seconds: Wall-clock time at most.
        epochs: Passes over the documents at most.
        batch_tokens: Tokens of one step, padding included. Many small steps teach a head that is
            trained for minutes far more than few large ones: on SmolLM2-135M 190,000 tokens in
            steps of 512 gave an agreement of 0.29, in steps of 2,048 one of 0.23.
        learning_rate: Peak learning rate; it warms up and falls along a cosine.
        seed: Seed of the order of documents.
    """

    seconds: float = 600.0
    epochs: float = 12.0
    batch_tokens: int = 512
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class HeadReport:
    """What training a head came to.

    Attributes:
        layer_idx: The checkpoint.
        feedback: Whether the head is given the previous final state.
        steps: Optimiser steps.
        tokens: Tokens seen, repetitions counted.
        seconds: Time taken.
        loss: Mean loss over the last tenth, nats.
        agreement: Share of held-out tokens on which the head's first choice is the base's.
        stand_in_agreement: The same with the head's own output as feedback, as inside a run of
            exits; None without feedback.
        top: Share of held-out tokens whose base choice is among the head's first 2, 4 and 8.
    """

    layer_idx: int
    feedback: bool
    steps: int
    tokens: int
    seconds: float
    loss: float
    agreement: float
    stand_in_agreement: float | None
    top: dict[int, float]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadReport:
        """A report from JSON values, whose keys are strings."""
        return cls(**{**values, "top": {int(n): rate for n, rate in values["top"].items()}})


def head_learning_rate(width: int) -> float:
    """Peak learning rate for heads of a base: 2e-3 at a width of 576, falling with the width.

    Adam moves every weight by the learning rate, so what a product changes grows with the number of
    its inputs (Yang et al. 2022, "Tensor Programs V").

    Args:
        width: Width of the base's hidden states.
    """
    return min(2e-3 * 576 / width, 3e-3)
