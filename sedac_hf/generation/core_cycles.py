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


def core_cycles(
    run: RowPass,
    state: RowState,
    texts: RowTexts,
    chooser: TokenChooser,
    head: HeadDraft | None = None,
    taps: Sequence[int] = (),
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
    """
    if type(run) is not NativePass or not _tokens_decide(texts, chooser):
        return None
    parts = run.look_again()
    if parts.embedding is None or parts.rotary.up_to(0) is None:
        return None
    if head is not None and parts.heads[head.k] is None:
        return None
    return CoreCycles(run, state, texts, chooser, head, taps)


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
    """The cycles of one call; they begin once each row's first token has been chosen."""

    def __init__(
        self,
        run: NativePass,
        state: RowState,
        texts: RowTexts,
        chooser: TokenChooser,
        head: HeadDraft | None,
        taps: Sequence[int],
    ) -> None:
        """Prepare; see `core_cycles`."""
        self._run = run
        self._state = state
        self._texts = texts
        self._chooser = chooser
        self._head = head
        self._taps = list(taps)
        self._core: _core.GreedyCycle | None = None
        self._position = 0

    def run(self, plan: _core.DraftPlan | None = None, *, asks: bool = False) -> _core.CycleOutcome:
        """Run a cycle; `say` hands on what came of it.

        Args:
            plan: How much to draft; None for one token a row.
            asks: Whether the head may be asked.

        Raises:
            NotNativeError: If the weights can no longer be read in place.
        """
        if self._core is None:
            self._core = self._begin()
        run, parts = self._run, self._run.look_again()
        tables = parts.rotary.up_to(self._position + int(self._texts.new.max()) + _AHEAD)
        head = None
        if self._head is not None:
            k = self._head.k
            if (stack := parts.heads[k]) is not None:
                head = (stack, run.cache(k), run.draft_output)
        if parts.embedding is None or tables is None or (head is None) != (self._head is None):
            raise NotNativeError("the embedding or a head was replaced while a text was written")
        return self._core.run(
            parts.base, run.cache(BASE), parts.output, parts.embedding, tables, threads(),
            plan, asks, head,
        )  # fmt: skip

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
