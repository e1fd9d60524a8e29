"""What the suite asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sedac_hf.config import MODES
from sedac_hf.errors import ConfigError, ModeError
from sedac_hf.evaluation.prompts import PROMPT_GROUPS

__all__ = ["TestConfig"]


@dataclass(frozen=True)
class TestConfig:
    """Limits of the tests, and how much they measure.

    Attributes:
        ppl_tolerance: Rise of perplexity that quality must stay below, as a fraction.
        judge_upper_end: Judge the upper end of the rise's 95 % interval in place of the rise.
        tie_units: Where the full depth has the last word: how far apart the baseline's logits of
            two tokens may be for them to count as a tie, in units of the data type's resolution.
        min_consistency: Share that decisions and tokens must stay above under noise, in [0, 1).
        noise_levels: Strengths of the noise, as fractions of a state's root mean square. The
            default begins at the largest rounding error of bfloat16 and ends at a hundredth.
        noise_documents: Most documents that noise is tried on.
        latency_slo_ms: Milliseconds that the percentiles of the time per token must stay below.
        min_speed_ratio: Least speed against the baseline; None asks for none.
        max_new_tokens: Tokens of each text that is written.
        rounds: Timed rounds after a warm-up.
        prompts: Most prompts that are timed.
        max_variance: Normalised variance between domains that exits and quality must stay below.
        shipped_domains: Prompt groups of the package that become domains, answered by the baseline,
            where the user's texts are of fewer than two domains.
        domain_documents: Prompts of each of them.
        answer_tokens: Most tokens of the baseline's answers.
        mode: Mode that is tested; None for `"certified"` where that is not refused, else the
            model's own.
        batch_tokens: Most tokens of one forward; None picks it.
        seed: Seed of every draw.
    """

    __test__: ClassVar[bool] = False  # the name begins as those that pytest collects

    ppl_tolerance: float = 0.01
    judge_upper_end: bool = False
    tie_units: float = 16.0
    min_consistency: float = 0.9
    noise_levels: Sequence[float] = (0.002, 0.004, 0.01)
    noise_documents: int = 32
    latency_slo_ms: float = 100.0
    min_speed_ratio: float | None = None
    max_new_tokens: int = 64
    rounds: int = 3
    prompts: int = 8
    max_variance: float = 0.2
    shipped_domains: Sequence[str] = PROMPT_GROUPS
    domain_documents: int = 16
    answer_tokens: int = 96
    mode: str | None = None
    batch_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse limits that no model could meet or miss.

        Raises:
            ConfigError: If a value is outside what it may be.
            ModeError: If the mode is unknown.
        """
        object.__setattr__(self, "noise_levels", tuple(self.noise_levels))
        object.__setattr__(self, "shipped_domains", tuple(self.shipped_domains))
        for name in ("ppl_tolerance", "latency_slo_ms", "max_variance", "min_speed_ratio"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} must be a finite number above 0, found {value!r}.")
        least = {"max_new_tokens": 2, "domain_documents": 2, "answer_tokens": 8}
        for name in (*least, "rounds", "prompts", "noise_documents"):
            value, low = getattr(self, name), least.get(name, 1)
            if value < low:
                raise ConfigError(f"{name} must be at least {low}, found {value!r}.")
        if not self.tie_units >= 0:
            raise ConfigError(f"tie_units must be at least 0, found {self.tie_units!r}.")
        if not 0 <= self.min_consistency < 1:
            raise ConfigError(
                f"min_consistency must be at least 0 and below 1, found {self.min_consistency!r}."
            )
        if not self.noise_levels or not all(0 < level < math.inf for level in self.noise_levels):
            raise ConfigError(
                f"noise_levels must be finite numbers above 0, at least one, found "
                f"{self.noise_levels!r}."
            )
        unknown = [group for group in self.shipped_domains if group not in PROMPT_GROUPS]
        if unknown:
            raise ConfigError(f"shipped_domains must be of {PROMPT_GROUPS}, found {unknown}.")
        if self.mode is not None and self.mode not in MODES:
            raise ModeError(f"mode must be one of {MODES}, found {self.mode!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
