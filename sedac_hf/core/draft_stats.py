"""What became of drafts in exact mode: sizes, acceptance by place, tokens per pass."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["DraftStats"]


class DraftStats:
    """Figures of one call or totals over many, safe to read and write from several threads.

    Attributes:
        reason: Why the last call in exact mode ran without drafts; empty when it did not.
        chains_reason: Why drafts of the last call were chains; empty when they were trees.
        choices: What each governor has measured and decided, as of the last call.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._passes = self._row_passes = self._tokens = 0
            self._nodes: Counter[int] = Counter()
            self._levels: Counter[int] = Counter()
            self._offered: Counter[int] = Counter()
            self._accepted: Counter[int] = Counter()
            self._sources: Counter[str] = Counter()
            self.reason = self.chains_reason = ""
            self.choices: list[dict[str, Any]] = []

    def add_pass(self, nodes: int, levels: int, rows: int, tokens: int) -> None:
        """Count a verification.

        Args:
            nodes: Nodes verified in each row, the root among them.
            levels: Calls of the exit head before it.
            rows: Rows that took part.
            tokens: Tokens that they gained together.
        """
        with self._lock:
            self._passes += 1
            self._row_passes += rows
            self._tokens += tokens
            self._nodes[nodes] += 1
            self._levels[levels] += 1

    def add_tree(self, deepest: int, sources: Sequence[str]) -> None:
        """Count the drafts of a row in a verification.

        Args:
            deepest: Depth of its deepest draft.
            sources: Where each accepted draft came from, `"head"` or `"lookup"`, in order.
        """
        with self._lock:
            for depth in range(1, deepest + 1):
                self._offered[depth] += 1
            for depth, source in enumerate(sources, 1):
                self._accepted[depth] += 1
                self._sources[source] += 1

    def merge(self, other: DraftStats) -> None:
        """Add the figures of a call.

        Args:
            other: Its figures; no longer written to.
        """
        with self._lock:
            self._passes += other._passes
            self._row_passes += other._row_passes
            self._tokens += other._tokens
            for name in ("_nodes", "_levels", "_offered", "_accepted", "_sources"):
                getattr(self, name).update(getattr(other, name))
            self.reason, self.choices = other.reason, other.choices
            self.chains_reason = other.chains_reason

    @property
    def passes(self) -> int:
        """Verifications."""
        return self._passes

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row gains in a pass; 0 when there was none."""
        with self._lock:
            return self._tokens / self._row_passes if self._row_passes else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of rows that accepted a draft at depth 1, 2, ... where their tree reached it."""
        with self._lock:
            depths = sorted(self._offered)
            return [self._accepted[depth] / self._offered[depth] for depth in depths]

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        acceptance, tokens_per_pass = self.acceptance, self.tokens_per_pass
        with self._lock:
            return {
                "passes": self._passes,
                "row_passes": self._row_passes,
                "tokens": self._tokens,
                "tokens_per_pass": tokens_per_pass,
                "offered": self._offered.total(),
                "accepted": self._accepted.total(),
                "acceptance_by_depth": acceptance,
                "passes_by_nodes": dict(sorted(self._nodes.items())),
                "passes_by_levels": dict(sorted(self._levels.items())),
                "accepted_by_source": dict(sorted(self._sources.items())),
                "reason_without_drafts": self.reason,
                "reason_for_chains": self.chains_reason,
                "governors": self.choices,
            }

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out: it cannot be copied."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()
