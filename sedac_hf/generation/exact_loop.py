"""Cycles of exact mode: draft a tree, verify it in one pass, keep what the base says too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.row_pass import BASE
from sedac_hf.generation.acceptance import walk
from sedac_hf.generation.draft_tree import DraftTree, stack_trees
from sedac_hf.generation.prompt_lookup import find_continuation
from sedac_hf.generation.row_state import chain_mask, gather_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sedac_hf.config import CheckpointSpec
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.generation.acceptance import TokenChooser, Walk
    from sedac_hf.generation.governor import Shape
    from sedac_hf.generation.head_draft import HeadDraft
    from sedac_hf.generation.row_state import RowState
    from sedac_hf.generation.row_texts import RowTexts

__all__ = ["ExactLoop"]

IntArray = npt.NDArray[np.int64]


class ExactLoop:
    """Decodes a batch whose prompt the pass has taken over."""

    def __init__(
        self,
        run: RowPass,
        depth: int,
        state: RowState,
        texts: RowTexts,
        chooser: TokenChooser,
        head: HeadDraft | None,
        *,
        keeps_states: bool = False,
    ) -> None:
        """Prepare to decode.

        Args:
            run: Runs layers and heads.
            depth: Layers of the base.
            state: Where the rows stand.
            texts: The rows' texts.
            chooser: Draws tokens.
            head: Drafts with an exit head; None for drafts from the text alone.
            keeps_states: Whether `store` will be asked for.
        """
        self._run = run
        self._depth = depth
        self._state = state
        self._texts = texts
        self._chooser = chooser
        self._head = head
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

    def decode(self, shape: Shape) -> None:
        """Run cycles until every row has stopped.

        Args:
            shape: Size of the trees.
        """
        while not self._texts.done.all():
            self.cycle(shape)

    def cycle(self, shape: Shape) -> Walk:
        """Draft, verify and accept once.

        Args:
            shape: Size of the trees.

        Returns:
            How far each row went.
        """
        state, texts = self._state, self._texts
        alive = ~texts.done
        trees = [
            DraftTree(int(self._roots[row]), max(texts.remaining(row) - 1, 0))
            for row in range(state.rows)
        ]
        entered = self._draft(trees, alive, shape)
        final = self._verify(trees, entered)
        found = walk(self._chooser, texts, trees, self._run.logits(final[1]))
        self._run.keep(BASE, state.length, found.path, found.counts)
        if self._head is not None:
            self._head.settled(final[0], final[1], found.path, found.counts)
        if self._finals is not None:
            self._finals.append((gather_nodes(final[1], found.path), found.counts))
        state.length = state.length + found.counts
        self._roots = found.roots
        return found

    def _draft(
        self, trees: Sequence[DraftTree], alive: npt.NDArray[np.bool_], shape: Shape
    ) -> Tensor | None:
        """Grow the trees; states at the head's checkpoint of the nodes that it has run."""
        entered = None
        if shape.nodes > 1:
            for row in np.flatnonzero(alive).tolist():
                self._look_up(trees[row], self._texts.text(row), shape)
            if self._head is not None and shape.levels:
                entered = self._head.draft(trees, alive, shape)
        for tree in trees:
            tree.take(shape.nodes - len(tree), shape.least)
        return entered

    def _look_up(self, tree: DraftTree, text: IntArray, shape: Shape) -> None:
        hit = find_continuation(text, shape.nodes - 1)
        if hit is not None:
            tokens = hit.tokens.tolist()
            first = 1 - 0.5**hit.matched
            tree.offer_path(tokens, [first ** (step + 1) for step in range(len(tokens))])

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
            self._run.head(k, hidden, feedback if spec.feedback else None, at)
        return states

    def _settled_states(self, new: IntArray, last: Tensor) -> Tensor:
        states = last.new_zeros((len(new), int(new.max()), last.shape[2]))
        filled = np.zeros_like(new)
        for kept, counts in self._finals or ():
            for row, count in enumerate(counts.tolist()):
                states[row, filled[row] : filled[row] + count] = kept[row, :count]
            filled += counts
        return states
