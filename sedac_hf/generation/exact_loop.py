"""Cycles of exact mode: draft a tree, verify it in one pass, keep what the base says too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.draft_stats import DraftStats
from sedac_hf.core.row_pass import BASE
from sedac_hf.generation.acceptance import walk
from sedac_hf.generation.draft_tree import BLANK, NAMES, ROOT, DraftTree, stack_trees
from sedac_hf.generation.prompt_lookup import find_continuation
from sedac_hf.generation.row_state import chain_mask, gather_nodes

if TYPE_CHECKING:
    from collections.abc import Callable

    from sedac_hf.config import CheckpointSpec
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.generation.acceptance import TokenChooser
    from sedac_hf.generation.core_cycles import CoreCycles
    from sedac_hf.generation.cycle import Cycle
    from sedac_hf.generation.governor import Governor
    from sedac_hf.generation.head_draft import HeadDraft
    from sedac_hf.generation.row_state import RowState
    from sedac_hf.generation.row_texts import RowTexts
    from sedac_hf.metrics.call_meter import CallMeter

__all__ = ["ExactLoop"]

IntArray = npt.NDArray[np.int64]


class _Accepted(NamedTuple):
    """Rows that took part in a cycle, their drafts, and the nodes that stay."""

    rows: Sequence[int]
    trees: Sequence[DraftTree]
    paths: Sequence[Sequence[int]]


class ExactLoop:
    """Decodes a batch whose prompt the pass has taken over.

    Attributes:
        stats: What became of the drafts.
    """

    def __init__(
        self,
        run: RowPass,
        depth: int,
        state: RowState,
        texts: RowTexts,
        chooser: TokenChooser,
        head: HeadDraft | None,
        governor: Governor,
        *,
        keeps_states: bool = False,
        rests: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        meter: CallMeter | None = None,
        core: CoreCycles | None = None,
    ) -> None:
        """Prepare to decode.

        Args:
            run: Runs layers and heads.
            depth: Layers of the base.
            state: Where the rows stand.
            texts: The rows' texts.
            chooser: Draws tokens.
            head: Drafts with an exit head; None for drafts from the text alone.
            governor: Says how much to draft.
            keeps_states: Whether `catch_up` will be asked for.
            rests: Whether nobody wants K/V of rows behind their end.
            clock: Seconds.
            meter: Reports the tokens to a collector.
            core: Runs each cycle as one call, where it can be.
        """
        self.stats = DraftStats()
        self._run = run
        self._depth = depth
        self._state = state
        self._texts = texts
        self._chooser = chooser
        self._head = head
        self._governor = governor
        self._clock = clock
        self._meter = meter
        self._core = core
        self._rests = rests
        self._roots = np.zeros(state.rows, np.int64)
        self._loaded = state.length.copy()
        self._finals: list[tuple[Tensor, IntArray]] | None = [] if keeps_states else None

    def begin(self, logits: Tensor) -> None:
        """Choose the first token of each row.

        Args:
            logits: The base's logits behind the prompt, `[rows, vocabulary]`.
        """
        rows = list(range(self._state.rows))
        self._roots = np.array(self._chooser.choose(self._texts, rows, logits), np.int64)
        if self._meter is not None:
            first = [[token] for token in self._roots.tolist()]
            self._meter.gained(first, [[ROOT]] * len(first))

    def decode(self) -> None:
        """Run cycles until every row has stopped."""
        while not self._texts.done.all():
            self.cycle()

    def cycle(self) -> None:
        """Draft, verify and accept: once, or in one call of the core a few times."""
        if self._core is not None:
            return self._in_core(self._core)
        texts, cycle = self._texts, self._begin()
        started, alive, had = self._clock(), ~texts.done, texts.new.copy()
        done = self._step_by_step(cycle, alive)
        cycle.is_whole = bool(alive.all())
        self._count(cycle, done, had)
        cycle.rest = self._clock() - started - cycle.verify - sum(cycle.levels)
        self._report(cycle, done)

    def _begin(self) -> Cycle:
        """A new cycle; what the head lacks of the prompt is no part of its time."""
        cycle = self._governor.begin()
        if cycle.on:
            self._run.catch_up()
        return cycle

    def _in_core(self, core: CoreCycles) -> None:
        """Cycles that go alike as one call."""
        texts, governor = self._texts, self._governor
        is_whole = not texts.done.any()
        alike = governor.alike(core.most)
        first, started = self._begin(), self._clock()
        outcomes = core.run(governor.plan(), asks=first.on, most=alike)
        # The others were begun by what was known then, too: none has been learned from yet.
        cycles = [first, *(governor.begin() for _ in outcomes[1:])]
        accepted = [_Accepted(each.rows, each.trees, each.paths) for each in outcomes]
        for cycle, outcome, done in zip(cycles, outcomes, accepted, strict=True):
            had = texts.new.copy()
            core.say(outcome)
            cycle.nodes, cycle.drafted = outcome.nodes, outcome.drafted
            cycle.levels, cycle.verify = outcome.levels, outcome.verify
            cycle.is_whole = is_whole
            self._count(cycle, done, had)
        inside = sum(cycle.verify + sum(cycle.levels) for cycle in cycles)
        rest = (self._clock() - started - inside) / max(len(cycles), 1)
        for cycle, done in zip(cycles, accepted, strict=True):
            cycle.on, cycle.rest = first.on, rest
            self._report(cycle, done)

    def _count(self, cycle: Cycle, done: _Accepted, had: IntArray) -> None:
        """What the rows, which had so many tokens before, were given."""
        cycle.gain = _least_gain(had, self._texts.new, ~self._texts.done)
        cycle.rows, cycle.tokens = len(done.rows), sum(map(len, done.paths))

    def _step_by_step(self, cycle: Cycle, alive: npt.NDArray[np.bool_]) -> _Accepted:
        """A cycle as many calls of the pass."""
        state, texts = self._state, self._texts
        trees = [
            DraftTree(
                int(self._roots[row]),
                max(texts.remaining(row) - 1, 0),
                chain=not self._run.holds_trees,
            )
            for row in range(state.rows)
        ]
        if self._rests:
            self._run.rest(texts.done)
        entered = self._draft(trees, alive, cycle)
        begun = self._clock()
        hidden, final = self._verify(trees, entered)
        found = walk(self._chooser, texts, trees, self._run, final)
        self._run.keep(BASE, state.length, found.path, found.counts)
        cycle.verify = self._clock() - begun
        cycle.nodes = len(trees[0])
        if self._head is not None:
            self._head.settled(hidden, final, found.path, found.counts)
        if self._finals is not None:
            self._finals.append((gather_nodes(final, found.path), found.counts))
        state.length = state.length + found.counts
        self._roots = found.roots
        rows = np.flatnonzero(alive).tolist()
        paths = [found.path[row, : found.counts[row]].tolist() for row in rows]
        return _Accepted(rows, [trees[row] for row in rows], paths)

    def _report(self, cycle: Cycle, done: _Accepted) -> None:
        """Tell the governor, the figures and the meter how it went."""
        self._governor.end(cycle, done.trees, done.paths)
        self.stats.add_pass(cycle.nodes, len(cycle.levels), cycle.rows, cycle.tokens)
        if cycle.nodes == 1 and self._meter is None:
            return  # bare roots
        drafts, sources = 0, []
        for tree, path in zip(done.trees, done.paths, strict=True):
            all_origins = tree.origins
            real = [d for d, o in zip(tree.depths, all_origins, strict=True) if o != BLANK]
            origins = [all_origins[node] for node in path[1:]]
            self.stats.add_tree(max(real), [NAMES[origin] for origin in origins])
            drafts += len(real) - 1
            sources.append([*origins, ROOT])
        if self._meter is not None:
            given = zip(done.rows, done.paths, strict=True)
            words = [self._texts.text(row)[-len(path) :].tolist() for row, path in given]
            self._meter.gained(words, sources, drafts)

    def _draft(
        self, trees: Sequence[DraftTree], alive: npt.NDArray[np.bool_], cycle: Cycle
    ) -> Tensor | None:
        """Grow the trees; states at the head's checkpoint of the nodes that it has run."""
        governor, entered, covered = self._governor, None, 0.0
        rows = np.flatnonzero(alive).tolist()
        for row in rows:
            covered += self._look_up(trees[row], self._texts.text(row))
        # Where the text itself says what comes, the head has less to add.
        promise = 1 - covered / max(len(rows), 1)
        if self._head is not None and cycle.on and governor.worth_asking(promise):
            entered, cycle.levels = self._head.draft(trees, alive, governor, self._clock)
            cycle.drafted = True
        least = len(trees[0])
        for row in rows:
            trees[row].take(governor.most_nodes - least)
        scores = [trees[row].scores for row in rows]
        size = governor.best_size(scores, least, cycle.drafted)
        for tree in trees:
            tree.cut(size)
        return entered

    def _look_up(self, tree: DraftTree, text: IntArray) -> float:
        """Put up what followed in the text before; probability that its first token is right."""
        hit = find_continuation(text, self._governor.most_nodes - 1)
        if hit is None:
            return 0.0
        scores = self._governor.found_scores(hit.matched, len(hit.tokens))
        tree.offer_path(hit.tokens.tolist(), scores, hit.matched)
        return scores[0]

    def _verify(self, trees: Sequence[DraftTree], entered: Tensor | None) -> tuple[Tensor, Tensor]:
        """States at the head's checkpoint and after the last layer, of all nodes."""
        stacked = stack_trees(trees)
        at = self._state.place(stacked.depths, stacked.seen)
        layer = -1 if self._head is None else self._head.layer
        if self._head is None or layer < 0:
            hidden = self._run.embed(torch.from_numpy(stacked.tokens), at.positions)
        else:
            known = 0 if entered is None else entered.shape[1]
            parts = [] if entered is None else [entered]
            if known < at.nodes:
                rest = slice(known, None)
                parts.append(
                    self._head.enter(
                        stacked.tokens[:, rest], stacked.depths[:, rest], stacked.seen[:, rest]
                    )
                )
            hidden = torch.cat(parts, dim=1)
        return hidden, self._run.layers(hidden, at, layer + 1, self._depth)

    def catch_up(self, specs: Sequence[CheckpointSpec], last: Tensor) -> Tensor:
        """Bring every head's cache level with the base's, and give the final-layer states.

        Args:
            specs: Checkpoints of all heads.
            last: The prompt's last final-layer state, `[rows, 1, width]`.

        Returns:
            Final-layer states of what was settled since the prompt, `[rows, most, width]`; zeros
            behind a row's own.
        """
        new = self._state.length - self._loaded
        states = self._settled_states(new, last)
        if not states.shape[1]:
            return states
        steps = np.tile(np.arange(states.shape[1]), (len(new), 1))
        at = self._state.place(steps, chain_mask(new, states.shape[1]), self._loaded)
        tokens = np.zeros(steps.shape, np.int64)
        for row, count in enumerate(new.tolist()):
            text = self._texts.text(row)
            begin = len(text) - int(self._texts.new[row])
            tokens[row, :count] = text[begin : begin + count]
        hidden = self._run.embed(torch.from_numpy(tokens), at.positions)
        feedback = torch.cat([last, states[:, :-1]], dim=1)
        layer = 0
        for k, spec in enumerate(specs):
            if spec.layer_idx >= layer:
                hidden = self._run.layers(hidden, at, layer, spec.layer_idx + 1)
                layer = spec.layer_idx + 1
            self._run.fill(k, hidden, feedback if spec.feedback else None, at)
        return states

    def _settled_states(self, new: IntArray, last: Tensor) -> Tensor:
        states = last.new_zeros((len(new), int(new.max()), last.shape[2]))
        filled = np.zeros_like(new)
        for kept, counts in self._finals or ():
            for row, count in enumerate(counts.tolist()):
                states[row, filled[row] : filled[row] + count] = kept[row, :count]
            filled += counts
        return states


def _least_gain(before: IntArray, after: IntArray, going: npt.NDArray[np.bool_]) -> float | None:
    """How far the row furthest behind has moved; None when no row goes on."""
    return float(after[going].min() - before[going].min()) if going.any() else None
