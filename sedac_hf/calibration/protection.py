"""Falling back to safe thresholds at once, and coming back only when all has been well for long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sedac_hf.errors import CalibrationError

__all__ = ["LEVELS", "Protection", "Signals"]

# From the boldest to the safest.
LEVELS = ("certified", "rung", "off")

# Coming back has to wait twice as long after each relapse, up to so many times.
_MOST_PATIENCE = 16


@dataclass(frozen=True)
class Signals:
    """What is known at one moment.

    Attributes:
        drift: Largest divergence of risks from calibration, nats; None when it is not known yet,
            or cannot be known.
        measures_drift: Whether the drift can be known.
        broken: Whether quality is beyond its bound by more than chance.
        sound: Whether quality is known and within its bound.
    """

    drift: float | None
    measures_drift: bool
    broken: bool
    sound: bool


class Protection:
    """Which thresholds act: those chosen, the safest certified ones, or none.

    Attributes:
        level: One of `LEVELS`.
        reason: Why it is not `"certified"`: `"drift"` or `"quality"`; empty when it is.
        fallbacks: How often it fell back.
        recoveries: How often it came back.
    """

    def __init__(
        self,
        drift_threshold: float,
        *,
        has_rung: bool,
        recovery: float = 0.5,
        patience: int = 1024,
    ) -> None:
        """Begin with the thresholds that were chosen.

        Args:
            drift_threshold: Divergence beyond which it falls back, nats.
            has_rung: Whether there is a safer certified policy to fall back to on drift; without
                one exits go off.
            recovery: Share of `drift_threshold` below which drift counts as gone.
            patience: Tokens for which all must have been well before it comes back.
        """
        self.level, self.reason = LEVELS[0], ""
        self.fallbacks = self.recoveries = 0
        self._drift_threshold = drift_threshold
        self._has_rung = has_rung
        self._recovery = recovery
        self._patience = patience
        self._factor = 1  # how much longer than `patience` to wait
        self._well = 0  # tokens since all has been well
        self._since = 0  # tokens since the last change

    @property
    def wait(self) -> int:
        """Tokens for which all must be well before it comes back."""
        return self._patience * self._factor

    def judge(self, tokens: int, signals: Signals) -> str | None:
        """Take note of what happened since the last time.

        Args:
            tokens: Tokens since then.
            signals: What is known now.

        Returns:
            `"fallback"` or `"recovery"` when the level changed, None when it did not.
        """
        self._since += tokens
        drifted = signals.drift is not None and not signals.drift <= self._drift_threshold
        if signals.broken and self.level != "off":
            return self._fall("off", "quality")
        if self.level == "certified":
            if drifted:
                return self._fall("rung" if self._has_rung else "off", "drift")
            if self._since > _MOST_PATIENCE * self._patience:
                self._factor = 1
            return None
        self._well = self._well + tokens if self._is_well(signals) else 0
        if self._well < self.wait:
            return None
        self.level, self.reason = "certified", ""
        self.recoveries += 1
        self._well = self._since = 0
        return "recovery"

    def _is_well(self, signals: Signals) -> bool:
        if signals.broken or not signals.sound:
            return False
        if not signals.measures_drift:
            return True
        gone = self._recovery * self._drift_threshold
        return signals.drift is not None and signals.drift <= gone

    def _fall(self, level: str, reason: str) -> str:
        # From one fallback to the next, or soon after coming back: a relapse.
        if self.level == "certified" and self.recoveries:
            self._factor = min(2 * self._factor, _MOST_PATIENCE)
        self.level, self.reason = level, reason
        self.fallbacks += 1
        self._well = self._since = 0
        return "fallback"

    def to_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        return {
            "level": self.level,
            "reason": self.reason,
            "fallbacks": self.fallbacks,
            "recoveries": self.recoveries,
            "factor": self._factor,
            "well": self._well,
            "since": self._since,
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave.

        Args:
            values: The record.

        Raises:
            CalibrationError: If it holds what cannot be.
        """
        level, reason = values["level"], values["reason"]
        allowed = (LEVELS if self._has_rung else ("certified", "off"), ("", "drift", "quality"))
        if (
            level not in allowed[0]
            or reason not in allowed[1]
            or (level == "certified") != (not reason)
        ):
            raise CalibrationError(f"level {level!r} for reason {reason!r} cannot be")
        numbers = {k: values[k] for k in ("fallbacks", "recoveries", "factor", "well", "since")}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise CalibrationError(
                    f"{name} must be a whole number, at least 0, found {value!r}"
                )
        if not 1 <= numbers["factor"] <= _MOST_PATIENCE:
            raise CalibrationError(f"factor must lie in 1 .. {_MOST_PATIENCE}")
        self.level, self.reason = str(level), str(reason)
        self.fallbacks, self.recoveries = numbers["fallbacks"], numbers["recoveries"]
        self._factor, self._well, self._since = (numbers[k] for k in ("factor", "well", "since"))
