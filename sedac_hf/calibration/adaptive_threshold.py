"""When a threshold may change while the model runs: quality, throughput, bounds, smoothing.

A tighter threshold is the safe direction and is never refused. A looser one has to earn it: the
rise of perplexity must be known and within the tolerance, and the throughput must be known and
reach its target, since a risk that buys nothing is not taken. A figure that is missing, NaN or
infinite loosens nothing.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from sedac_hf.errors import CalibrationError, ConfigError

__all__ = ["DualMetricCalibration", "ThresholdUpdate"]

_LARGEST = 3.4028234e38  # of float32, in which thresholds act


@dataclass(frozen=True)
class ThresholdUpdate:
    """What became of a new threshold.

    Attributes:
        layer_idx: The checkpoint.
        accepted: Whether the threshold changed, or was asked to stay as it is.
        threshold: The threshold in force now.
        previous: The one before; 0, which lets nothing leave, where none was known.
        reason: `"accepted"`; `"bounded"` when the bounds cut it; else what refused it:
            `"threshold"` (no number), `"drift"`, `"quality"` or `"throughput"`.
        detail: The same in words, with figures.
    """

    layer_idx: int
    accepted: bool
    threshold: float
    previous: float
    reason: str
    detail: str


class DualMetricCalibration:
    """Thresholds that follow two metrics, safe to use from several threads.

    Attributes:
        ppl_tolerance: Most that perplexity may rise, as a fraction.
        throughput_target: Least throughput, as a multiple of that without exits.
        drift_threshold: Divergence of risks from calibration, in nats, from which on nothing is
            loosened.
    """

    def __init__(
        self,
        ppl_tolerance: float = 0.01,
        throughput_target: float = 1.1,
        drift_threshold: float = 0.1,
        *,
        smoothing: float = 0.3,
        thresholds: Mapping[int, float] | None = None,
        bounds: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        """Begin with thresholds in force, or with none.

        Args:
            ppl_tolerance: Most that perplexity may rise, as a fraction.
            throughput_target: Least throughput, as a multiple of that without exits.
            drift_threshold: Largest divergence of risks from calibration, in nats.
            smoothing: Share of the way to a new threshold that one update goes, in (0, 1].
            thresholds: Thresholds in force, by layer.
            bounds: Least and largest threshold, by layer. By default 0 and the threshold that was
                in force at the beginning; no upper bound where none was.

        Raises:
            ConfigError: If a value is out of its range.
        """
        for name, value, low in (
            ("ppl_tolerance", ppl_tolerance, 0.0),
            ("throughput_target", throughput_target, 0.0),
            ("drift_threshold", drift_threshold, 0.0),
        ):
            if not _is_number(value) or not value > low:
                raise ConfigError(f"{name} must be a finite number above 0, found {value!r}.")
        if not _is_number(smoothing) or not 0 < smoothing <= 1:
            raise ConfigError(f"smoothing must lie in (0, 1], found {smoothing!r}.")
        self.ppl_tolerance = float(ppl_tolerance)
        self.throughput_target = float(throughput_target)
        self.drift_threshold = float(drift_threshold)
        self.smoothing = float(smoothing)
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._thresholds: dict[int, float] = {}
        self._bounds: dict[int, tuple[float, float]] = {}
        self.begin(thresholds or {}, bounds)

    def begin(
        self, thresholds: Mapping[int, float], bounds: Mapping[int, tuple[float, float]] | None
    ) -> None:
        """Put thresholds in force, whatever was in force before.

        Args:
            thresholds: Thresholds by layer.
            bounds: As at construction.

        Raises:
            ConfigError: If a threshold or a bound is none, or a threshold lies outside its bounds.
        """
        limits = {layer: (0.0, value) for layer, value in thresholds.items()} | dict(bounds or {})
        for layer, (low, high) in limits.items():
            value = thresholds.get(layer, low)
            if not (_is_number(value) and _is_number(low) and 0 <= low <= value <= high):
                raise ConfigError(
                    f"layer {layer}: expected 0 <= lower bound <= threshold <= upper bound, found "
                    f"{low!r}, {value!r}, {high!r}."
                )
        with self._lock:
            self._thresholds = {int(k): float(v) for k, v in thresholds.items()}
            self._bounds = {int(k): (float(a), float(b)) for k, (a, b) in limits.items()}

    @property
    def thresholds(self) -> dict[int, float]:
        """Thresholds in force, by layer."""
        with self._lock:
            return dict(self._thresholds)

    @property
    def outcomes(self) -> dict[str, int]:
        """How many updates had each reason."""
        with self._lock:
            return dict(self._outcomes)

    def update_threshold(
        self, layer_idx: int, new_threshold: float, metrics: Mapping[str, float | None]
    ) -> ThresholdUpdate:
        """Ask for another threshold.

        Checked in this order: drift and quality, throughput, bounds; then the threshold in force
        moves a share `smoothing` of the way.

        Args:
            layer_idx: The checkpoint.
            new_threshold: The threshold wanted.
            metrics: What was measured: `ppl_increase` (rise of perplexity, as a fraction),
                `throughput` (multiple of that without exits) and, where it is known, `drift`
                (nats).

        Returns:
            What became of it.
        """
        with self._lock:
            before = self._thresholds.get(layer_idx, 0.0)
            refusal = self._refusal(before, new_threshold, metrics)
            if refusal is not None:
                reason, detail = refusal
                self._outcomes[reason] += 1
                return ThresholdUpdate(layer_idx, False, before, before, reason, detail)
            low, high = self._bounds.get(layer_idx, (0.0, _LARGEST))
            wanted = min(max(float(new_threshold), low), high)
            # The first threshold of a checkpoint has nothing to be smoothed with.
            share = self.smoothing if layer_idx in self._thresholds else 1.0
            after = (1 - share) * before + share * wanted
            # Rounding must not carry it past where it was to go.
            after = min(max(after, min(before, wanted)), max(before, wanted))
            self._thresholds[layer_idx] = after
            reason = "accepted" if wanted == new_threshold else "bounded"
            detail = f"{before:.6g} -> {after:.6g}, {new_threshold:.6g} was asked for"
            if reason == "bounded":
                detail += f" and lies outside [{low:.6g}, {high:.6g}]"
            self._outcomes[reason] += 1
            return ThresholdUpdate(layer_idx, True, after, before, reason, detail)

    def _refusal(
        self, before: float, wanted: float, metrics: Mapping[str, float | None]
    ) -> tuple[str, str] | None:
        """Why a threshold is refused, and the same in words."""
        if not _is_number(wanted) or wanted < 0:
            return "threshold", f"a threshold is a finite number, at least 0, found {wanted!r}"
        if wanted <= before:
            return None
        drift = metrics.get("drift", 0.0)
        if not _is_number(drift) or drift > self.drift_threshold:
            return "drift", f"the drift of risks is {drift}, at most {self.drift_threshold} nats"
        rise = metrics.get("ppl_increase")
        if not _is_number(rise) or rise > self.ppl_tolerance:
            return (
                "quality",
                f"the rise of perplexity is {rise}, expected at most {self.ppl_tolerance}",
            )
        speed = metrics.get("throughput")
        if not _is_number(speed) or speed < self.throughput_target:
            return (
                "throughput",
                f"the throughput is {speed}, expected at least {self.throughput_target} times that "
                "without exits",
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Limits, thresholds and what became of updates, as JSON values."""
        with self._lock:
            return {
                "ppl_tolerance": self.ppl_tolerance,
                "throughput_target": self.throughput_target,
                "drift_threshold": self.drift_threshold,
                "thresholds": {str(k): v for k, v in self._thresholds.items()},
                "outcomes": dict(self._outcomes),
            }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over the thresholds of `to_dict`; limits and bounds stay.

        Args:
            values: The record.

        Raises:
            CalibrationError: If it names other layers, or a threshold is outside its bounds.
        """
        found = {int(k): float(v) for k, v in values["thresholds"].items()}
        with self._lock:
            if found.keys() != self._thresholds.keys():
                raise CalibrationError(
                    f"it has thresholds of layers {sorted(found)}, expected "
                    f"{sorted(self._thresholds)}"
                )
            for layer, value in found.items():
                low, high = self._bounds.get(layer, (0.0, _LARGEST))
                if not low <= value <= high:
                    raise CalibrationError(
                        f"the threshold of layer {layer} is {value}, outside [{low}, {high}]"
                    )
            self._thresholds = found
            self._outcomes = Counter({str(k): int(v) for k, v in values["outcomes"].items()})

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out: it cannot be copied."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
