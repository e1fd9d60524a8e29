"""Whether final exits pay: blocks of steps with them and without take turns, then the faster runs.

In certified mode exits change the text, so which tokens may leave would depend on the clock.
`SEDAC_GOVERNOR=off` lets exits always act: for runs that must be repeatable to the token.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sedac_hf.generation.costs import Tally

if TYPE_CHECKING:
    from sedac_hf.core.cascade_config import CascadeConfig

__all__ = ["BLOCK", "ExitGovernor", "ExitGovernors", "exits_always_act", "is_governed"]

BLOCK = 8  # steps between two decisions
_TRIAL = 5  # blocks that take turns before the first decision; the first one only warms up
_RETRY = 3
_FIRST_WAIT, _LONGEST_WAIT = 32, 256  # blocks without exits between tries
_LOOK = 32  # of so many blocks with exits, one goes without to see what that takes now


_FREE: ContextVar[bool] = ContextVar("sedac_exits_always_act", default=False)


@contextmanager
def exits_always_act() -> Iterator[None]:
    """Inside the block, in this thread, exits act whether they pay or not."""
    token = _FREE.set(True)
    try:
        yield
    finally:
        _FREE.reset(token)


def is_governed() -> bool:
    """Whether the governor may turn exits off."""
    if _FREE.get():
        return False
    return os.environ.get("SEDAC_GOVERNOR", "").lower() not in ("off", "0", "false")


class ExitGovernor:
    """What a step takes with exits and without, at one batch size; lives as long as the model."""

    def __init__(self, expected: float | None = None) -> None:
        """Begin with what is expected.

        Args:
            expected: What a step with exits should take, as a multiple of one without. Exits that
                should not pay are tried only after a while. None if nobody knows.
        """
        self._lock = threading.Lock()
        self._seconds = {acts: Tally(0.0, 1e-9, 0.99) for acts in (True, False)}
        self._known = {True: False, False: False}
        self._left = _TRIAL if expected is None or expected < 1.0 else 0
        self._blocks = self._acted = self._since = 0
        self._wait = _FIRST_WAIT

    @property
    def pays(self) -> bool:
        """Whether a step takes less time with exits, as far as is known."""
        return self._known[True] and self._seconds[True].value < self._seconds[False].value

    def begin(self) -> bool:
        """Whether exits act in the next block of steps."""
        with self._lock:
            acts = self._next()
            self._blocks += 1
            self._acted += acts
            return acts

    def _next(self) -> bool:
        if self._left > 0:
            self._left -= 1
            return self._left % 2 == 1
        self._since += 1
        if self.pays:
            self._wait = _FIRST_WAIT
            return self._since % _LOOK != 0
        if self._since < self._wait:
            return False
        # Text changes: what exits were worth before says little of what they are worth now.
        self._since, self._left = 0, _RETRY - 1
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._seconds[True] = Tally(0.0, 1e-9, 0.99)
        self._known[True] = False
        return True

    def end(self, acts: bool, steps: int, seconds: float) -> None:
        """Learn what steps took.

        Args:
            acts: Whether exits acted in them, or tokens that had left were caught up with.
            steps: How many.
            seconds: Time of all together.
        """
        with self._lock:
            if self._blocks <= 1 or steps == 0:
                return
            usual = self._seconds[acts].value if self._known[acts] else seconds / steps
            # A block that something else held up says little of what steps take.
            self._seconds[acts].add(min(seconds, 3 * usual * steps), steps)
            self._known[acts] = True

    def to_dict(self) -> dict[str, Any]:
        """What it has measured and decided, as JSON values; times in milliseconds."""
        with self._lock:
            times = {
                acts: 1e3 * self._seconds[acts].value if self._known[acts] else None
                for acts in (True, False)
            }
            return {
                "acting": self._left > 0 or self.pays,
                "blocks": self._blocks,
                "blocks_with_exits": self._acted,
                "step_ms_with_exits": times[True],
                "step_ms_without": times[False],
            }


class ExitGovernors:
    """The governors of a model's exits, one for each batch size; new rules begin anew."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._known: dict[int, tuple[CascadeConfig, ExitGovernor]] = {}

    def find(self, rows: int, rules: CascadeConfig, expected: float | None = None) -> ExitGovernor:
        """The governor at a batch size.

        Args:
            rows: Rows of the batch.
            rules: The rules by which tokens leave.
            expected: See `ExitGovernor`; of one row, where exits save most.
        """
        with self._lock:
            known = self._known.get(rows)
            if known is None or known[0] != rules:
                known = (rules, ExitGovernor(expected))
                self._known[rows] = known
            return known[1]
