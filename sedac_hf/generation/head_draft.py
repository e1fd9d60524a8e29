"""Drafting with an exit head: its own K/V follow the text, true states redo what was drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.generation.draft_tree import stack_trees
from sedac_hf.generation.row_state import chain_mask, gather_nodes

if TYPE_CHECKING:
    from sedac_hf.config import CheckpointSpec
    from sedac_hf.core.row_pass import Placement, RowPass
    from sedac_hf.generation.draft_tree import DraftTree
    from sedac_hf.generation.governor import Governor
    from sedac_hf.generation.head_watch import HeadWatch
    from sedac_hf.generation.row_state import RowState

__all__ = ["HeadDraft"]

IntArray = npt.NDArray[np.int64]


class HeadDraft:
    """One exit head as the source of drafts.

    Its cache holds every settled position computed from the true final state of the position
    before. Accepted drafts were computed from stand-ins, so they are redone, together with the
    next root, in the first call of the next draft. `draft::grow` of the Rust core does the same
    within a whole cycle.

    Attributes:
        k: Index of the head.
        layer: Layer of its checkpoint, -1 for the embedding.
        feeds: Whether it takes deep feedback.
        tokens: Token ids of the draft vocabulary; None for all.
        last: Final-layer state of each row's last settled position, `[rows, 1, width]`.
        hits: How often the base's choice is among the head's first 1, 2, 4 and 8, if known.
    """

    def __init__(
        self,
        run: RowPass,
        k: int,
        spec: CheckpointSpec,
        state: RowState,
        tokens: Tensor | None,
        last: Tensor,
        watch: HeadWatch | None = None,
        hits: Sequence[float] | None = None,
    ) -> None:
        """Draft with head `k`.

        Args:
            run: Runs layers and heads.
            k: Index of the head.
            spec: Its checkpoint.
            state: Where the rows stand; right behind the prompt.
            tokens: Token ids of the draft vocabulary; None for all.
            last: The prompt's last final-layer state, `[rows, 1, width]`.
            watch: Is shown every exit from true states once the base's own state is known.
            hits: How often the base's choice is among the head's first 1, 2, 4 and 8; None if
                nobody knows.
        """
        self.hits = hits
        self._watch = watch
        self._root: tuple[Tensor, Tensor] | None = None  # states before and behind the head
        self.k = k
        self.layer = spec.layer_idx
        self.feeds = spec.feedback
        self._run = run
        self._state = state
        self.tokens = None if tokens is None else np.asarray(tokens.cpu())
        self._length = state.length.copy()
        self.last = last
        self._has_root = False
        # Positions that the head's cache lacks: states at the checkpoint, and the final-layer
        # states of their predecessors, `[rows, most, width]` each.
        self._pending = last[:, :0]
        self._before = last[:, :0]
        self._counts = np.zeros(state.rows, np.int64)

    def enter(self, tokens: IntArray, depths: IntArray, seen: npt.NDArray[np.bool_]) -> Tensor:
        """States at the checkpoint, on the base's own slots.

        Args:
            tokens: Tokens of nodes, `[rows, n]`.
            depths: Their depths, `[rows, n]`.
            seen: Which open nodes each sees, `[rows, n, open]`.

        Returns:
            `[rows, n, width]`.
        """
        at = self._state.place(depths, seen)
        hidden = self._run.embed(torch.from_numpy(tokens), at.positions)
        if self.layer >= 0:
            hidden = self._run.layers(hidden, at, 0, self.layer + 1)
        return hidden

    def draft(
        self,
        trees: Sequence[DraftTree],
        alive: npt.NDArray[np.bool_],
        governor: Governor,
        clock: Callable[[], float],
    ) -> tuple[Tensor, list[float]]:
        """Grow trees from their roots.

        Args:
            trees: One per row, with its root alone taken.
            alive: Rows that go on, `[rows]`.
            governor: Says how far to go.
            clock: Seconds.

        Returns:
            States at the checkpoint of all nodes taken, `[rows, nodes, width]`, and the seconds of
            each level.
        """
        rows, begun, spent = len(trees), clock(), list[float]()
        zero = np.zeros((rows, 1), np.int64)
        stacked = stack_trees(trees)
        hidden = self.enter(stacked.tokens, zero, stacked.seen)
        states = self._redo_and_root(hidden, alive)
        self._offer(trees, states, zero, governor)
        while True:
            now = clock()
            spent.append(now - begun)
            begun, at = now, len(trees[0])
            going = [trees[row] for row in np.flatnonzero(alive).tolist()]
            scores = [tree.all_scores(governor.most_nodes) for tree in going]
            next_ones = [tree.next_scores(governor.width) for tree in going]
            if not governor.worth_a_level(len(spent), scores, next_ones):
                return hidden, spent
            if not any([tree.take(governor.width, known=at) for tree in trees]):
                return hidden, spent
            stacked = stack_trees(trees)
            new = slice(at, len(trees[0]))
            depths, parents = stacked.depths[:, new], stacked.parents[:, new]
            fresh = self.enter(stacked.tokens[:, new], depths, stacked.seen[:, new])
            hidden = torch.cat([hidden, fresh], dim=1)
            # The root is settled in the head's own cache: the open nodes are those behind it.
            where = self._state.place(depths - 1, stacked.seen[:, new, 1:], self._length)
            fresh = self._head(fresh, gather_nodes(states, parents), where)
            states = torch.cat([states, fresh], dim=1)
            nodes = np.tile(np.arange(new.start, new.stop), (rows, 1))
            self._offer(trees, fresh, nodes, governor)

    def settled(self, hidden: Tensor, final: Tensor, path: IntArray, counts: IntArray) -> None:
        """Take note of what was accepted.

        Args:
            hidden: States at the checkpoint of all nodes, `[rows, nodes, width]`.
            final: Their final-layer states, same shape.
            path: Nodes that stay, the root first, `[rows, most]`.
            counts: How many stay, `[rows]`.
        """
        kept = gather_nodes(final, path)
        if self._watch is not None and self._root is not None:
            self._watch.see(*self._root, kept[:, :1], (counts > 0)[:, None])
            self._root = None
        before = torch.cat([self.last, kept[:, :-1]], dim=1)
        skip = 1 if self._has_root else 0
        new = np.maximum(counts - skip, 0)
        order = np.arange(int((self._counts + new).max()))
        room = self._pending.shape[1]
        own = np.where(order < self._counts[:, None], order, order - self._counts[:, None] + room)
        # Behind a row's own anything may stand, but it must exist.
        own = np.minimum(own, room + path.shape[1] - skip - 1) if len(order) else own
        fresh = gather_nodes(hidden, path[:, skip:])
        self._pending = gather_nodes(torch.cat([self._pending, fresh], dim=1), own)
        self._before = gather_nodes(torch.cat([self._before, before[:, skip:]], dim=1), own)
        self._counts = self._counts + new
        at = np.maximum(counts - 1, 0)[:, None]
        stays = torch.from_numpy(counts == 0).to(kept.device).view(-1, 1, 1)
        self.last = torch.where(stays, self.last, gather_nodes(kept, at))
        self._has_root = False

    def _redo_and_root(self, root: Tensor, alive: npt.NDArray[np.bool_]) -> Tensor:
        """One call over the positions that the cache lacks and the root; the root's state."""
        most = int(self._counts.max())
        order = np.arange(most + 1)
        # Behind a row's own positions stands its root, over and over.
        own = np.where(order < self._counts[:, None], order, most)
        hidden = gather_nodes(torch.cat([self._pending[:, :most], root], dim=1), own)
        feedback = gather_nodes(torch.cat([self._before[:, :most], self.last], dim=1), own)
        steps = np.minimum(order, self._counts[:, None])
        at = self._state.place(steps, chain_mask(self._counts + 1, most + 1), self._length)
        states = self._head(hidden, feedback, at)
        found = gather_nodes(states, self._counts[:, None])
        if self._watch is not None:
            # What a position was followed by as feedback is its own final state. Rows that have
            # ended may not be computed any more.
            valid = (order[:most] < self._counts[:, None]) & alive[:, None]
            self._watch.see(hidden[:, :most], states[:, :most], feedback[:, 1:], valid)
            self._root = (root, found)
        self._length = self._length + self._counts + alive
        self._counts = np.zeros_like(self._counts)
        self._pending, self._before = root[:, :0], root[:, :0]
        self._has_root = True
        return found

    def _head(self, hidden: Tensor, feedback: Tensor, at: Placement) -> Tensor:
        return self._run.head(self.k, hidden, feedback if self.feeds else None, at)

    def _offer(
        self, trees: Sequence[DraftTree], states: Tensor, nodes: IntArray, governor: Governor
    ) -> None:
        """Put up the most probable continuations of some nodes."""
        tokens, chances = self.candidates(states, governor.most_nodes - 1)
        for row, tree in enumerate(trees):
            depths, scores = tree.depths, tree.scores
            for column, node in enumerate(nodes[row].tolist()):
                if scores[node] > 0:  # no blank
                    trust = governor.trust(depths[node] + 1)
                    own = [chance * trust for chance in chances[row][column]]
                    tree.offer(node, tokens[row][column], own)

    def candidates(
        self, states: Tensor, most: int
    ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """The most probable tokens behind some nodes, and their probabilities.

        Args:
            states: States for the final norm, `[rows, n, width]`.
            most: Candidates a node.
        """
        places, chances = self._run.draft_top(states, most)
        ids = places if self.tokens is None else self.tokens[places]
        return ids.tolist(), chances.tolist()

    def trial(self, tokens: IntArray) -> None:
        """Run one level behind the settled positions; leaves nothing behind.

        Args:
            tokens: Tokens of a chain, `[rows, n]`.
        """
        rows, nodes = tokens.shape
        steps = np.tile(np.arange(nodes), (rows, 1))
        seen = chain_mask(np.full(rows, nodes), nodes)
        hidden = self.enter(tokens, steps, seen)
        at = self._state.place(steps, seen, self._length)
        self.candidates(self._head(hidden, torch.zeros_like(hidden), at), 8)
