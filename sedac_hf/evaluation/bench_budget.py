"""How much of a benchmark fits into the time that it may take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sedac_hf.evaluation.arms import Batch
from sedac_hf.evaluation.bench_plan import BenchPlan

__all__ = ["EARLY_EXIT_CALLS", "Budget"]

# Early-exit drafting takes several times as long as the base's own call.
EARLY_EXIT_CALLS = 4
# What a further row of a batch costs, and a token of the prompt, of a pass for one token.
_ROW, _PROMPT_TOKEN = 0.3, 1 / 8
# How much longer a cell may take than those before it foretell.
_MARGIN = 1.5


class Budget:
    """Deals the time that is left out to the cells that are left, by their work."""

    def __init__(self, plan: BenchPlan, *, native: bool = False) -> None:
        """Start the clock.

        Args:
            plan: What is to be measured, and in which time.
            native: Whether the native pass serves, so that some modes are run twice.
        """
        self._plan = plan
        self._native = native
        self._begun = time.monotonic()
        self._rate = 0.0  # seconds for a unit of work

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    def expect(self, rate: float) -> None:
        """Take a first guess of the seconds that a call takes for a token."""
        self._rate = rate

    def learn(self, seconds: float, batches: Sequence[Batch]) -> None:
        """Take note of what a cell took.

        Args:
            seconds: The time.
            batches: The batches that were measured in it.
        """
        self._rate = seconds / self._work(batches)

    def affordable(self, cells: Sequence[Sequence[Batch]]) -> int:
        """How many batches of the first of some cells can be measured.

        Args:
            cells: The batches of every cell that is left, at least one cell.

        Returns:
            All where time does not matter; 0 where not even one batch would end in time.
        """
        first = cells[0]
        if self._plan.seconds is None:
            return len(first)
        left, share = self._plan.seconds - self.spent, self._share(cells)
        for count in range(len(first), 0, -1):
            if self._rate * self._work(first[:count]) <= share:
                return count
        return int(_MARGIN * self._rate * self._work(first[:1]) <= left)

    def limit(self, cells: Sequence[Sequence[Batch]]) -> float | None:
        """Seconds after which the first of some cells begins no further batch; None for no end."""
        return None if self._plan.seconds is None else _MARGIN * self._share(cells)

    def _share(self, cells: Sequence[Sequence[Batch]]) -> float:
        """Seconds that the first of some cells gets of what is left."""
        left = (self._plan.seconds or 0.0) - self.spent
        return left * self._work(cells[0]) / sum(map(self._work, cells))

    def _work(self, batches: Sequence[Batch]) -> float:
        """Tokens that are written, each as often as it costs passes for a single one."""
        rows = len(batches[0].ids)
        calls = self._plan.repeats * len(batches)
        if not self._plan.quick:
            calls += min(self._plan.warm_up or len(batches), len(batches))
        arms = 2 + len(self._plan.modes)
        if self._native and (second := self._plan.second_modes(rows)):
            arms += len({"plain", *second})
        if rows == 1:
            arms += 1 + EARLY_EXIT_CALLS
        length = max(batch.ids.shape[1] for batch in batches)
        tokens = self._plan.tokens + length * _PROMPT_TOKEN
        return calls * arms * tokens * (1 + _ROW * (rows - 1))
