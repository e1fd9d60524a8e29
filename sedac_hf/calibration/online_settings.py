"""What online calibration is told to do, beside its limits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sedac_hf.errors import ConfigError

__all__ = ["OnlineSettings"]


@dataclass(frozen=True)
class OnlineSettings:
    """How online calibration watches and reacts.

    Attributes:
        memory: After so many tokens what was seen counts 1/e.
        patience: Tokens for which all must have been well before thresholds come back.
        recovery: Share of the drift threshold below which drift counts as gone, in (0, 1].
        audit_share: Chance that a settled exit, or one that exact mode would have made, is held
            against full depth: one product with the head, no change of any token.
        full_depth_share: Chance that a step is run at full depth where that is the only way to
            see what exits would have cost: exits whose K/V are propagated, and all steps while
            thresholds have fallen back.
        fallback: Where thresholds go on drift: `"rung"`, the safest certified policy if there is
            a safer one than that in use, else off; or `"off"`. A broken bound turns exits off.
        target_exit_rate: Share of tokens that thresholds aim at, by the quantile of recent risks,
            within their bounds; None takes that of the cascade, and leaves thresholds alone where
            it has none.
        loosest: By how many times a threshold may exceed the one that was chosen. Above 1 the
            certificate no longer covers what acts.
        seed: Seed of what is looked at.
    """

    memory: int = 1024
    patience: int = 1024
    recovery: float = 0.5
    audit_share: float = 0.25
    full_depth_share: float = 0.05
    fallback: str = "rung"
    target_exit_rate: float | None = None
    loosest: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ConfigError: If a value is out of its range.
        """
        for name, least in (("memory", 16), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an int, at least {least}, found {value!r}.")
        for name in ("recovery", "audit_share", "full_depth_share"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], found {value!r}.")
        if self.fallback not in ("rung", "off"):
            raise ConfigError(f"fallback must be 'rung' or 'off', found {self.fallback!r}.")
        rate = self.target_exit_rate
        if rate is not None and not 0 < rate < 1:
            raise ConfigError(f"target_exit_rate must lie between 0 and 1, found {rate!r}.")
        if not (math.isfinite(self.loosest) and self.loosest >= 1):
            raise ConfigError(f"loosest must be a finite number from 1 on, found {self.loosest!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)
