"""The governors of a model: one for each batch size and exit head, measured at first use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sedac_hf.generation.costs import PassCosts, Tally
from sedac_hf.generation.cycle import ROWS_SHARE, off_cycle, one_level
from sedac_hf.generation.governor import Governor
from sedac_hf.generation.row_state import chain_mask

if TYPE_CHECKING:
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.generation.head_draft import HeadDraft
    from sedac_hf.generation.row_state import RowState

__all__ = ["Governors", "expected_passes", "measure_level", "measure_passes"]

_SIZES = (1, 2, 4, 8, 16)
_REPEATS = 2
_DEAR = 2.0
_WIDTH = 2  # nodes that a level behind the first expands, where drafts are trees

Clock = Callable[[], float]


class Governors:
    """What is known of a model's speed, by batch size; shared by all calls."""

    def __init__(self) -> None:
        """Begin with nothing known."""
        self._lock = threading.Lock()
        # What passes from some layer to the logits take, by rows and that layer.
        self._passes: dict[int, dict[int, PassCosts]] = {}
        # What is left of them once a head has brought the roots to that layer.
        self._tails: dict[int, dict[int, PassCosts]] = {}
        self._off: dict[int, tuple[Tally, Tally]] = {}
        self._known: dict[tuple[int, int], Governor] = {}

    def pick_head(
        self, rows: int, layers: Sequence[int], hits: Sequence[Sequence[float]] | None = None
    ) -> int | None:
        """The head to draft with: the one that promises most.

        Where it is known how often heads are right, that and what they cost decides: texts differ
        more than heads do, so what each did with a text of its own says little. Otherwise each is
        tried once, then the fastest serves.

        Args:
            rows: Rows of the batch.
            layers: The checkpoint of each head.
            hits: How often the base's choice is among each head's first 1, 2, 4 and 8.
        """
        with self._lock:
            known = [self._known.get((rows, k)) for k in range(len(layers))]
            passes, tails = self._passes.get(rows, {}), self._tails.get(rows, {})
        if hits and any(known):
            levels = _levels(known, layers, passes)
            promised = [
                one_level(tails[layer + 1], level, own, ROWS_SHARE if rows > 1 else 1.0)
                for layer, level, own in zip(layers, levels, hits, strict=True)
            ]
            rates = [tokens / max(seconds, 1e-9) for tokens, seconds in promised]
            return rates.index(max(rates))
        for k, governor in enumerate(known):
            if governor is None or governor.is_undecided:
                return k
        rated = [(g.promise, -k) for k, g in enumerate(known) if g is not None]
        return -max(rated)[1] if rated else None

    def find(
        self,
        run: RowPass,
        starts: Sequence[int],
        depth: int,
        state: RowState,
        head: HeadDraft | None,
        clock: Clock = time.perf_counter,
    ) -> Governor:
        """The governor of a head at this batch size; measures costs when it is new.

        Args:
            run: Runs layers and heads.
            starts: First layer behind the checkpoint of each head.
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
            passes = self._passes.get(state.rows)
            if passes is None:
                passes = expected_passes(self._passes, state.rows)
                if passes is None:
                    passes = measure_passes(run, state, sorted({0, *starts}), depth, clock)
                self._passes[state.rows] = passes
                self._tails[state.rows] = {start: _behind_root(passes, start) for start in passes}
                self._off[state.rows] = off_cycle(passes[0])
            full, off = passes[0], self._off[state.rows]
            width = _WIDTH if run.holds_trees else 1
            if head is None:
                found = Governor(full, width=width, rows=state.rows, off=off)
            else:
                level = measure_level(head, state.rows, clock)
                found = Governor(
                    full, self._tails[state.rows][head.layer + 1], level,
                    width=width, rows=state.rows, hits=head.hits, off=off,
                )  # fmt: skip
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


def _behind_root(passes: Mapping[int, PassCosts], start: int) -> PassCosts:
    """What a pass takes from a layer to which the root alone has been brought."""
    if start == 0:
        return passes[0]
    others = {nodes: seconds for nodes, seconds in passes[0].to_dict().items() if nodes > 1}
    return PassCosts({1: passes[start].of(1), **others}, weight=2.0)


def _levels(
    known: Sequence[Governor | None], layers: Sequence[int], passes: Mapping[int, PassCosts]
) -> list[float]:
    """Seconds of a call of each head: heads differ by the layers before them."""
    early = [passes[0].of(1) - passes[layer + 1].of(1) for layer in layers]
    own = next(g.level - before for g, before in zip(known, early, strict=True) if g is not None)
    return [
        max(own + before, 0.0) if found is None else found.level
        for found, before in zip(known, early, strict=True)
    ]


def measure_passes(
    run: RowPass, state: RowState, starts: Sequence[int], depth: int, clock: Clock
) -> dict[int, PassCosts]:
    """What passes from some layers to the logits take: each pass is timed in parts.

    Args:
        run: Runs the layers.
        state: Where the rows stand.
        starts: The layers, ascending, 0 among them.
        depth: Layers of the base.
        clock: Seconds.

    Returns:
        Costs by the layer that a pass starts from; those from 0 include the embedding.
    """
    taken: dict[int, dict[int, float]] = {start: {} for start in starts}
    for nodes in _SIZES:
        steps = np.tile(np.arange(nodes), (state.rows, 1))
        at = state.place(steps, chain_mask(np.full(state.rows, nodes), nodes))
        tokens = torch.zeros(steps.shape, dtype=torch.long)
        for _ in range(_REPEATS):
            begun = [clock()]
            hidden = run.embed(tokens, at.positions)
            for start, stop in zip(starts, [*starts[1:], depth], strict=True):
                if start > 0:
                    begun.append(clock())
                if start < stop:
                    hidden = run.layers(hidden, at, start, stop)
            run.best(hidden)
            ended = clock()
            for start, since in zip(starts, begun, strict=True):
                spans = taken[start]
                spans[nodes] = min(spans.get(nodes, ended - since), ended - since)
        if taken[0][nodes] > _DEAR * taken[0][1]:
            break  # larger trees will not pay, and their cost follows in a straight line
    return {start: PassCosts(spans) for start, spans in taken.items()}


def expected_passes(
    known: Mapping[int, Mapping[int, PassCosts]], rows: int
) -> dict[int, PassCosts] | None:
    """What passes should take by those over fewer rows; None without any.

    A pass over n nodes of each of r rows takes about as long as one over r n nodes of one row.

    Args:
        known: What passes take, by rows and the layer that they start from.
        rows: Rows that are asked about.
    """
    fewer = [each for each in known if each < rows]
    if not fewer:
        return None
    nearest = max(fewer)
    ratio = rows / nearest
    return {
        start: PassCosts({size: costs.of(size * ratio) for size in _SIZES}, weight=1.0)
        for start, costs in known[nearest].items()
    }


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
