"""How much faster steps are with exits than without, by the clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sedac_hf.errors import CalibrationError

__all__ = ["ThroughputMonitor"]

_LEAST = 16.0  # steps of each kind from which there is an opinion


class ThroughputMonitor:
    """Mean time of steps at full depth over that of all steps, older ones counting less and less.

    Not safe for several threads at once: whoever holds it locks.
    """

    def __init__(self, memory: int) -> None:
        """Begin with nothing seen.

        Args:
            memory: After so many steps what was seen counts 1/e.
        """
        self._memory = memory
        # Seconds and number: of plain steps, of all steps.
        self._sums = np.zeros((2, 2))

    def add(self, plain: tuple[float, int], steps: tuple[float, int]) -> None:
        """Take note of some steps.

        Args:
            plain: Seconds and number of those at full depth, nothing pending.
            steps: Seconds and number of all.
        """
        fresh = np.array([plain, steps], np.float64)
        keep = np.exp(-fresh[:, 1:] / self._memory)
        self._sums = keep * self._sums + fresh

    @property
    def ratio(self) -> float | None:
        """Throughput as a multiple of that without exits; None while it is not known."""
        seconds, count = self._sums.T
        if not (count >= _LEAST).all() or not (seconds > 0).all():
            return None
        plain, mean = seconds / count
        return float(plain / mean)

    def to_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON values."""
        return {"sums": self._sums.tolist()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave.

        Args:
            values: The record.

        Raises:
            CalibrationError: If it holds what no sum can be.
        """
        sums = np.asarray(values["sums"], np.float64)
        if sums.shape != (2, 2) or not (np.isfinite(sums) & (sums >= 0)).all():
            raise CalibrationError("the times of steps must be finite and at least 0")
        self._sums = sums
