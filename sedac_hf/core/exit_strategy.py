"""What an exit skips: every later layer, or the less important channels of their MLPs.

A soft exit runs the tail, each MLP on its most important channels alone. The token comes from the
base's own head on what the tail says, so no exit head is asked; K/V are those of the narrower tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.errors import ConfigError

__all__ = [
    "DEFAULT_STEEPNESS",
    "STRATEGIES",
    "WIDTHS",
    "AdaptiveSoftExit",
    "ExitStrategy",
    "HardExit",
    "SoftExit",
    "is_soft",
    "make_strategy",
    "soft_exit_mlp_scaling",
    "strategy_name",
]

STRATEGIES: Final = ("hard", "soft", "adaptive-soft")
# An MLP runs on one to eight eighths of its channels.
WIDTHS: Final = 8
DEFAULT_STEEPNESS: Final = 10.0

FloatArray = npt.NDArray[np.float64]
Eighths = npt.NDArray[np.uint8]
Ratio = TypeVar("Ratio", float, FloatArray, Tensor)


def strategy_name(name: object) -> str:
    """The name of a strategy as it is stored.

    Args:
        name: One of `STRATEGIES`; ``adaptive_soft`` is taken for ``adaptive-soft``.

    Raises:
        ConfigError: If there is no such strategy.
    """
    found = name.replace("_", "-") if isinstance(name, str) else name
    if not isinstance(found, str) or found not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {STRATEGIES}, found {name!r}.")
    return found


def is_soft(name: str) -> bool:
    """Whether a strategy runs the tail."""
    return name != "hard"


def soft_exit_mlp_scaling(confidence_ratio: Ratio, k: float = DEFAULT_STEEPNESS) -> Ratio:
    """Share of an MLP that a soft exit skips: ``1 / (1 + exp(-k (confidence_ratio - 0.5)))``.

    Args:
        confidence_ratio: Confidence as a share of the most that there can be: a number, an array or
            a tensor. NaN skips nothing.
        k: How steeply the share rises with confidence, at least 0; at 0 it is a half throughout.

    Returns:
        Shares in [0, 1], of the same kind and shape.

    Raises:
        ConfigError: If `k` is negative or not finite.
    """
    check_steepness(k)
    if isinstance(confidence_ratio, Tensor):
        # Through the hyperbolic tangent, which does not overflow: the same function.
        scaled = 0.5 + 0.5 * torch.tanh(0.5 * k * (confidence_ratio - 0.5))
        return scaled.nan_to_num(nan=0.0)
    scaled = 0.5 + 0.5 * np.tanh(0.5 * k * (np.asarray(confidence_ratio) - 0.5))
    found = np.where(np.isnan(scaled), 0.0, scaled)
    return found if isinstance(confidence_ratio, np.ndarray) else float(found)


def check_steepness(k: float) -> None:
    """Refuse a steepness that is no finite number of at least 0."""
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not math.isfinite(k) or k < 0:
        raise ConfigError(f"steepness (k) must be a finite number, at least 0, found {k!r}.")


@dataclass(frozen=True)
class HardExit:
    """An exit skips every later layer; the exit head makes the token."""

    name: ClassVar[str] = "hard"

    def skipped(self, confidence: FloatArray) -> FloatArray:
        """Share of the tail that an exit skips: all of it.

        Args:
            confidence: Normalised confidences of exits, any shape.

        Returns:
            Ones; zeros where the confidence is NaN, which never exits.
        """
        return np.where(np.isnan(confidence), 0.0, 1.0)


@dataclass(frozen=True)
class SoftExit:
    """An exit runs the tail on fewer channels of its MLPs, equally few in every layer.

    Attributes:
        steepness: `k` of `soft_exit_mlp_scaling`, of which the confidence ratio is the cascade's
            normalised confidence.
    """

    steepness: float = DEFAULT_STEEPNESS
    name: ClassVar[str] = "soft"

    def __post_init__(self) -> None:
        """Refuse a bad steepness.

        Raises:
            ConfigError: If it is negative or not finite.
        """
        check_steepness(self.steepness)

    def skipped(self, confidence: FloatArray) -> FloatArray:
        """Share of the tail's MLPs that an exit is to skip.

        Args:
            confidence: Normalised confidences of exits, any shape.

        Returns:
            Shares in [0, 1], same shape; 0 where the confidence is NaN.
        """
        found: FloatArray = soft_exit_mlp_scaling(confidence, self.steepness)
        return found

    def kept(self, confidence: FloatArray, layer_idx: int, num_layers: int) -> Eighths:
        """Eighths of its channels that each MLP of the tail keeps, rounded up, at least one.

        Args:
            confidence: Normalised confidences of exits, `[n]`.
            layer_idx: Layer of their checkpoint.
            num_layers: Layers of the base.

        Returns:
            `[num_layers - layer_idx - 1, n]`, one row for each layer of the tail.
        """
        skipped = self.skipped(np.asarray(confidence, np.float64))
        along = self._along(num_layers - layer_idx - 1)
        share = 1.0 - np.clip(along[:, None] * skipped[None, :], 0.0, 1.0)
        # A millionth off, so that a share of exactly n eighths stays n in spite of rounding.
        return np.clip(np.ceil(WIDTHS * share - 1e-6), 1, WIDTHS).astype(np.uint8)

    def _along(self, tail: int) -> FloatArray:
        """What the skipped share is multiplied by in each layer of the tail."""
        return np.ones(tail)


@dataclass(frozen=True)
class AdaptiveSoftExit(SoftExit):
    """The same, and layers right behind the checkpoint keep more than those further on.

    Layer `i` of `n` of the tail skips ``2 (i + 1/2) / n`` times the share, at most all: as much as
    `SoftExit` on average. What an early layer of the tail gets wrong goes through all that follow
    and into their K/V, which later tokens see; what a late one gets wrong concerns this token only.
    """

    name: ClassVar[str] = "adaptive-soft"

    def _along(self, tail: int) -> FloatArray:
        return np.asarray(2.0 * (np.arange(tail) + 0.5) / max(tail, 1))


ExitStrategy = HardExit | SoftExit | AdaptiveSoftExit


def make_strategy(name: str, steepness: float = DEFAULT_STEEPNESS) -> ExitStrategy:
    """The strategy of a name.

    Args:
        name: One of `STRATEGIES`.
        steepness: Of the soft ones.

    Raises:
        ConfigError: If there is no such strategy, or the steepness is bad.
    """
    name = strategy_name(name)
    if name == "hard":
        return HardExit()
    return SoftExit(steepness) if name == "soft" else AdaptiveSoftExit(steepness)
