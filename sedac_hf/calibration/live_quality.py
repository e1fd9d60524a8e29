"""How much perplexity rises while the model runs, from exits that were held against full depth.

Of every exit at a checkpoint the divergence ``KL(full || exit)`` is what the NLL rises by on
average over the base's own words. Only a share s of the exits is looked at, so each stands for
1 / s of them, and tokens that did not leave rise by nothing: the mean rise per token is
``sum_i KL_i / s_i / tokens`` (Horvitz and Thompson), older tokens counting less and less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_hf.errors import CalibrationError

__all__ = ["QualityMonitor"]

FloatArray = npt.NDArray[np.float64]

_MOST = 20.0  # nats; a divergence that is not finite counts as this much
_LEAST = 8.0  # exits looked at from which there is an opinion of what is beyond the bound
_SURE = 1.645  # standard errors: one-sided 95 %
_FIELDS = ("tokens", "rise", "squares", "judged", "agreed")


class QualityMonitor:
    """Running mean of the rise of the NLL per token, by checkpoint.

    Not safe for several threads at once: whoever holds it locks.
    """

    def __init__(self, checkpoints: int, limit: float, *, memory: int = 1024) -> None:
        """Begin with nothing seen.

        Args:
            checkpoints: Number of checkpoints.
            limit: Largest rise that is allowed, nats per token.
            memory: After so many tokens what was seen counts 1/e.
        """
        self._limit = limit
        self._memory = memory
        # Sums over tokens: how many, of the rise, of its squares, exits looked at, those that
        # had the base's first choice.
        self._sums: dict[str, FloatArray] = {name: np.zeros(checkpoints) for name in _FIELDS}

    def passed(self, tokens: float, k: int | None = None) -> None:
        """Tokens whose exits have been or will be looked at; what was before fades.

        Args:
            tokens: How many they stand for.
            k: At which checkpoint; None for all.
        """
        where = slice(None) if k is None else k
        keep = math.exp(-tokens / self._memory)
        for each in self._sums.values():
            each[where] *= keep
        self._sums["tokens"][where] += tokens

    def judged(
        self, k: int, divergence: FloatArray, agree: npt.NDArray[np.bool_], share: float
    ) -> None:
        """Exits that were held against full depth.

        Args:
            k: At which checkpoint.
            divergence: KL divergence of each from full depth, nats, `[exits]`.
            agree: Whether both have the same first choice, `[exits]`.
            share: Chance that each had of being looked at.
        """
        rise = np.nan_to_num(divergence, nan=_MOST, posinf=_MOST, neginf=_MOST)
        rise = np.clip(rise, 0.0, _MOST) / share
        self._sums["rise"][k] += rise.sum()
        self._sums["squares"][k] += np.square(rise).sum()
        self._sums["judged"][k] += len(rise)
        self._sums["agreed"][k] += np.count_nonzero(agree)

    @property
    def rise(self) -> float | None:
        """Mean rise of the NLL per token, all checkpoints together, in nats; None at first."""
        if not self._sums["tokens"].any():
            return None
        return float(self._means().sum())

    @property
    def error(self) -> float:
        """Standard error of `rise`, in nats."""
        tokens = np.maximum(self._sums["tokens"], 1e-9)
        spread = np.maximum(self._sums["squares"] / tokens - self._means() ** 2, 0.0)
        return float(np.sqrt((spread / tokens).sum()))

    @property
    def is_broken(self) -> bool:
        """Whether the rise is beyond the limit by more than chance."""
        rise = self.rise
        enough = self._sums["judged"].sum() >= _LEAST
        return rise is not None and bool(enough) and rise - _SURE * self.error > self._limit

    @property
    def is_sound(self) -> bool:
        """Whether the rise is known and within the limit."""
        rise = self.rise
        return rise is not None and rise <= self._limit

    def agreement(self) -> list[float | None]:
        """Share of the exits looked at that had the base's first choice, by checkpoint."""
        judged, agreed = self._sums["judged"], self._sums["agreed"]
        return [float(a / j) if j > 0 else None for a, j in zip(agreed, judged, strict=True)]

    def _means(self) -> FloatArray:
        return np.asarray(self._sums["rise"] / np.maximum(self._sums["tokens"], 1e-9))

    def to_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON values."""
        return {name: each.tolist() for name, each in self._sums.items()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave.

        Args:
            values: The record.

        Raises:
            CalibrationError: If it is of other checkpoints, or holds what no sum can be.
        """
        found = {name: np.asarray(values[name], np.float64) for name in _FIELDS}
        for name, each in found.items():
            if each.shape != self._sums[name].shape:
                raise CalibrationError(
                    f"{name} of the quality has shape {each.shape}, expected "
                    f"{self._sums[name].shape}"
                )
            if not (np.isfinite(each) & (each >= 0)).all():
                raise CalibrationError(f"{name} of the quality must be finite and at least 0")
        self._sums = found
