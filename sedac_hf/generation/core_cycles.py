"""Greedy decoding by whole cycles in the Rust core: one call drafts, verifies and accepts.

The loops in Python do the same step by step, with whatever pass, processors or criteria a call has.
Where nothing but best words, end tokens and a length decide a text, no step needs the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf import _core
from sedac_hf.core.native_model import threads
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import BASE
from sedac_hf.errors import NotNativeError
from sedac_hf.generation.draft_tree import NAMES

if TYPE_CHECKING:
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.generation.acceptance import TokenChooser
    from sedac_hf.generation.head_draft import HeadDraft
    from sedac_hf.generation.row_state import RowState
    from sedac_hf.generation.row_texts import RowTexts

__all__ = ["CoreCycles", "core_cycles", "spare_looks"]

IntArray = npt.NDArray[np.int64]

# Positions that the nodes of a cycle may lie behind its root, at most.
_AHEAD = 64
# Cycles of one call at most, and seconds after which it begins no more: an interrupt must wait.
_MOST, _LONGEST = 16, 0.05


def core_cycles(
    run: RowPass,
    state: RowState,
    texts: RowTexts,
    chooser: TokenChooser,
    head: HeadDraft | None = None,
    taps: Sequence[int] = (),
    *,
    timed: bool = False,
) -> CoreCycles | None:
    """Whole cycles of a call, or None where they must be run step by step.

    Nobody may want K/V of rows behind their end, or states of settled positions but those tapped.

    Args:
        run: Runs layers and heads.
        state: Where the rows stand, behind the prompt.
        texts: The rows' texts.
        chooser: Draws tokens.
        head: The exit head that drafts, or None.
        taps: Numbers of layers after which states are wanted, ascending; without drafts only.
        timed: Whether somebody wants to know when each token came.
    """
    if type(run) is not NativePass or not _tokens_decide(texts, chooser):
        return None
    parts = run.look_again()
    if parts.embedding is None or parts.rotary.up_to(0) is None:
        return None
    if head is not None and parts.heads[head.k] is None:
        return None
    most = 1 if timed or texts.is_streamed else _MOST
    return CoreCycles(run, state, texts, chooser, head, taps, most)


def spare_looks(run: RowPass, texts: RowTexts, chooser: TokenChooser) -> None:
    """Let a native pass look at the weights rarely where no code of the caller's runs in a text.

    Args:
        run: Runs layers and heads.
        texts: The rows' texts.
        chooser: Draws tokens.
    """
    if type(run) is NativePass and _tokens_decide(texts, chooser) and not texts.calls_out:
        run.look_rarely()


def _tokens_decide(texts: RowTexts, chooser: TokenChooser) -> bool:
    """Whether nothing but best words, end tokens and a length decides a text."""
    return chooser.takes_best(texts) and texts.ends_by_tokens


class CoreCycles:
    """The cycles of one text (or batch); they begin once each row's first token has been chosen.

    Attributes:
        most: Cycles that one call may run; 1 where each token must be told of as it comes.
    """

    def __init__(
        self,
        run: NativePass,
        state: RowState,
        texts: RowTexts,
        chooser: TokenChooser,
        head: HeadDraft | None,
        taps: Sequence[int],
        most: int = 1,
    ) -> None:
        """Prepare; see `core_cycles`."""
        self.most = most
        self._run = run
        self._state = state
        self._texts = texts
        self._chooser = chooser
        self._head = head
        self._taps = list(taps)
        self._core: _core.GreedyCycle | None = None
        self._position = 0
        self._steps = 1  # cycles since the weights were last looked at, or asked after

    def run(
        self, plan: _core.DraftPlan | None = None, *, asks: bool = False, most: int = 1
    ) -> list[_core.CycleOutcome]:
        """Run some cycles; `say` hands on what came of each. They end when a row does.

        Args:
            plan: How much to draft; None for one token a row.
            asks: Whether the head may be asked.
            most: Cycles at most; at least one is run.

        Raises:
            NotNativeError: If the weights can no longer be read in place.
        """
        if self._core is None:
            self._core = self._begin()
        run, parts = self._run, self._run.look_again(steps=self._steps)
        most = min(most, self.most)
        tables = parts.rotary.up_to(self._position + int(self._texts.new.max()) + most * _AHEAD)
        head = None
        if self._head is not None:
            k = self._head.k
            if (stack := parts.heads[k]) is not None:
                head = (stack, run.cache(k, asks=asks), run.draft_output)
        if parts.embedding is None or tables is None or (head is None) != (self._head is None):
            raise NotNativeError("the embedding or a head was replaced while a text was written")
        outcomes = self._core.run(
            parts.base, run.cache(BASE), parts.output, parts.embedding, tables, threads(),
            plan, asks, head, most, _LONGEST,
        )  # fmt: skip
        self._steps = len(outcomes)
        return outcomes

    def say(self, outcome: _core.CycleOutcome) -> None:
        """Append to the texts what a cycle has given them.

        Args:
            outcome: The cycle.
        """
        length = self._state.length.copy()
        for row, words, origins in zip(outcome.rows, outcome.words, outcome.origins, strict=True):
            length[row] += len(words)
            for word, origin in zip(words, origins, strict=True):
                self._texts.append(row, word, origin=NAMES[origin])
        self._state.length = length

    def begin_anew(self) -> None:
        """Let the next cycle begin where the rows stand by then: others have taken steps."""
        self._core = None

    def tapped(self, outcome: _core.CycleOutcome) -> list[Tensor]:
        """States of all rows at each tap and at the end, `[rows, 1, width]`; zeros of ended rows.

        Args:
            outcome: The cycle.
        """
        rows, found = torch.tensor(outcome.rows), []
        for states in outcome.tapped:
            own = torch.from_numpy(states).view(len(rows), 1, -1)
            if len(rows) < self._state.rows:
                every = torch.zeros(self._state.rows, 1, own.shape[-1])
                every[rows] = own
                own = every
            found.append(own)
        return found

    def _begin(self) -> _core.GreedyCycle:
        state, texts, head = self._state, self._texts, self._head
        rows = range(state.rows)
        position = state.positions(state.length, np.zeros((state.rows, 1), np.int64))[:, 0]
        # Of the prompts' ends: rows go on from there by as many tokens as they are given.
        self._position = int((position - texts.new).max())
        setting = None
        if head is not None:
            last = np.ascontiguousarray(head.last[:, -1].float().numpy(force=True))
            setting = (head.layer + 1, head.feeds, head.tokens, last)
        return _core.GreedyCycle(
            [texts.text(row) for row in rows],
            np.ascontiguousarray(state.first, np.int64),
            np.ascontiguousarray(state.length, np.int64),
            np.ascontiguousarray(position, np.int64),
            np.array([texts.remaining(row) for row in rows], np.int64),
            np.array([texts.length(row) for row in rows], np.int64),
            sorted(texts.ends),
            self._chooser.least_lengths(),
            setting,
            self._taps,
        )
