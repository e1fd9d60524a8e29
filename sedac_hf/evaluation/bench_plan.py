"""What `sedac bench` measures, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

from sedac_hf.config import MODES
from sedac_hf.errors import ConfigError, ModeError
from sedac_hf.evaluation.prompts import PROMPT_GROUPS

__all__ = ["BENCH_MODES", "BenchPlan"]

BENCH_MODES = ("exact", "certified", "plain", "off")
# Modes that are also run on the base's own modules where the native pass serves them.
_ON_MODULES = ("exact", "plain")
_QUICK_SECONDS = 480.0


@dataclass(frozen=True)
class BenchPlan:
    """Sizes of a benchmark.

    Attributes:
        groups: Prompt groups.
        batches: Batch sizes.
        modes: Modes that get rows.
        tokens: Tokens that each call writes.
        prompts: Prompts of a group; a batch that needs more takes more.
        repeats: Rounds that are kept.
        warm_up: Batches of the round before; None for all.
        checked: Batches that are rerun in float32; None for all. Where float32 is what is timed,
            all are compared at no cost.
        search_tokens: Tokens of each call that looks for the best layer of early-exit drafting.
        seconds: Time after which nothing new is begun; None for no limit.
        quick: Whether sizes were chosen to end soon.
        seed: Seed of the bootstrap.
    """

    groups: tuple[str, ...] = PROMPT_GROUPS
    batches: tuple[int, ...] = (1, 4, 8)
    modes: tuple[str, ...] = BENCH_MODES
    tokens: int = 96
    prompts: int = 24
    repeats: int = 2
    warm_up: int | None = 2
    checked: int | None = None
    search_tokens: int = 24
    seconds: float | None = None
    quick: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: If a group is unknown, a list is empty or repeats itself, or a size is
                below 1.
            ModeError: If a mode is unknown.
        """
        if unknown := [group for group in self.groups if group not in PROMPT_GROUPS]:
            raise ConfigError(f"a prompt group must be one of {PROMPT_GROUPS}, found {unknown}.")
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise ModeError(f"a mode must be one of {BENCH_MODES}, found {unknown}.")
        for name in ("groups", "batches", "modes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must name at least one, each once; found {values}.")
        sizes = {
            name: getattr(self, name) for name in ("tokens", "prompts", "repeats", "search_tokens")
        }
        sizes["batches"] = min(self.batches)
        if small := {name: size for name, size in sizes.items() if size < 1}:
            raise ConfigError(f"every size must be at least 1, found {small}.")

    @classmethod
    def quick_sizes(cls) -> dict[str, int | float | bool | None]:
        """Sizes that end within ten minutes on two cores for a model of 135 M weights."""
        return {
            "tokens": 32,
            "prompts": 4,
            "repeats": 1,
            "warm_up": 1,
            "checked": 1,
            "search_tokens": 8,
            "seconds": _QUICK_SECONDS,
            "quick": True,
        }

    def warmed_up(self, known: bool) -> int | None:
        """Batches that are run before those that count.

        Args:
            known: Whether another group was measured at this batch size before; in a quick run it
                has warmed up the rest.
        """
        return 0 if self.quick and known else self.warm_up

    def second_modes(self, rows: int) -> tuple[str, ...]:
        """Modes that get a second row, on the base's own modules, where the native pass serves.

        Args:
            rows: Batch size; a quick run has such rows at batch 1 only.
        """
        if self.quick and rows > 1:
            return ()
        return tuple(mode for mode in self.modes if mode in _ON_MODULES)
