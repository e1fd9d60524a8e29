"""The governors of a model: one for each batch size and exit head, measured at first use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sedac_hf.generation.costs import PassCosts, Tally
from sedac_hf.generation.governor import Governor, off_cycle
from sedac_hf.generation.row_state import chain_mask

if TYPE_CHECKING:
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.generation.head_draft import HeadDraft
    from sedac_hf.generation.row_state import RowState

__all__ = ["Governors", "expected_costs", "measure_level", "measure_passes"]

_SIZES = (1, 2, 4, 8, 16)
_TOLD = 2  # nodes at which a tail is held against a whole pass
_REPEATS = 2
_DEAR = 2.0
_WIDTH = 2  # nodes that a level behind the first expands, where drafts are trees

Clock = Callable[[], float]


class Governors:
    """What is known of a model's speed, by batch size; shared by all calls."""

    def __init__(self) -> None:
        """Begin with nothing known."""
        self._lock = threading.Lock()
        self._full: dict[int, PassCosts] = {}
        self._off: dict[int, tuple[Tally, Tally]] = {}
        self._known: dict[tuple[int, int], Governor] = {}

    def pick_head(self, rows: int, heads: int) -> int | None:
        """The head to draft with: each is tried once, then the fastest serves.

        Args:
            rows: Rows of the batch.
            heads: Number of heads.
        """
        with self._lock:
            known = [self._known.get((rows, k)) for k in range(heads)]
        for k, governor in enumerate(known):
            if governor is None or governor.is_undecided:
                return k
        rated = [(g.promise, -k) for k, g in enumerate(known) if g is not None]
        return -max(rated)[1] if rated else None

    def find(
        self,
        run: RowPass,
        depth: int,
        state: RowState,
        head: HeadDraft | None,
        clock: Clock = time.perf_counter,
    ) -> Governor:
        """The governor of a head at this batch size; measures costs when it is new.

        Args:
            run: Runs layers and heads.
            depth: Layers of the base.
            state: Where the rows stand; slots behind them are written over.
            head: The head, or None.
            clock: Seconds.
        """
        key = (state.rows, -1 if head is None else head.k)
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                return found
            width = _WIDTH if run.holds_trees else 1
            full = self._full.get(state.rows)
            if full is None:
                full = expected_costs(self._full, state.rows)
                if full is None:
                    full = PassCosts(measure_passes(run, state, 0, depth, clock))
                self._full[state.rows] = full
                self._off[state.rows] = off_cycle(full)
            off = self._off[state.rows]
            if head is None:
                found = Governor(full, width=width, rows=state.rows, off=off)
            else:
                tail = full
                if head.layer >= 0:
                    # One size tells what the early layers take of a pass; others are in proportion.
                    spans = measure_passes(run, state, head.layer + 1, depth, clock, sizes=(_TOLD,))
                    whole = measure_passes(run, state, 0, depth, clock, sizes=(_TOLD,))
                    tail = full.scaled(spans[_TOLD] / max(whole[_TOLD], 1e-9))
                level = measure_level(head, state.rows, clock)
                found = Governor(
                    full, tail, level, width=width, rows=state.rows, hits=head.hits, off=off
                )
            self._known[key] = found
            return found

    def to_dict(self) -> list[dict[str, Any]]:
        """What each governor has measured and decided, as JSON values."""
        with self._lock:
            known = sorted(self._known.items())
        return [
            {"batch": rows, "head": None if k < 0 else k, **governor.to_dict()}
            for (rows, k), governor in known
        ]


def expected_costs(known: Mapping[int, PassCosts], rows: int) -> PassCosts | None:
    """What passes should take by those over fewer rows; None without any.

    A pass over n nodes of each of r rows takes about as long as one over r n nodes of one row.

    Args:
        known: What passes take, by rows.
        rows: Rows that are asked about.
    """
    fewer = [each for each in known if each < rows]
    if not fewer:
        return None
    nearest = max(fewer)
    costs, ratio = known[nearest], rows / nearest
    return PassCosts({size: costs.of(size * ratio) for size in _SIZES}, weight=1.0)


def measure_passes(
    run: RowPass,
    state: RowState,
    start: int,
    depth: int,
    clock: Clock,
    sizes: Sequence[int] = _SIZES,
) -> dict[int, float]:
    """Seconds of a pass from a layer to the logits, by number of nodes.

    Args:
        run: Runs the layers.
        state: Where the rows stand.
        start: First layer.
        depth: Layers of the base.
        clock: Seconds.
        sizes: Numbers of nodes, ascending; those behind one that takes long are left out.
    """
    taken: dict[int, float] = {}
    for nodes in sizes:
        steps = np.tile(np.arange(nodes), (state.rows, 1))
        at = state.place(steps, chain_mask(np.full(state.rows, nodes), nodes))
        tokens = torch.zeros(steps.shape, dtype=torch.long)
        spans = []
        for _ in range(_REPEATS):
            begun = clock()
            hidden = run.embed(tokens, at.positions)
            run.best(run.layers(hidden, at, start, depth))
            spans.append(clock() - begun)
        taken[nodes] = min(spans)
        if taken[nodes] > _DEAR * taken[sizes[0]]:
            break  # larger trees will not pay, and their cost follows in a straight line
    return taken


def measure_level(head: HeadDraft, rows: int, clock: Clock) -> float:
    """Seconds of one call of a head over two nodes, with what belongs to it.

    Args:
        head: The head.
        rows: Rows of the batch.
        clock: Seconds.
    """
    spans = []
    for _ in range(_REPEATS + 1):
        begun = clock()
        head.trial(np.zeros((rows, 2), np.int64))
        spans.append(clock() - begun)
    return min(spans)
