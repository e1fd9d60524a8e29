"""Tokens whose layers are not all run yet: a chain that catches up layer by layer, as needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.attention_spread import Spread

if TYPE_CHECKING:
    from sedac_hf.core.row_pass import Placement, RowPass
    from sedac_hf.generation.row_state import RowState

__all__ = ["HeadQueue", "OpenNodes"]

# Positions from which on it is dearer to run a head on all of them than to write their K/V first.
_MANY = 16


class HeadQueue:
    """Positions that one exit head has not seen yet; they are run together when it is asked."""

    def __init__(self, run: RowPass, k: int, feeds: bool, state: RowState) -> None:
        """Begin right behind a prompt that the head has seen.

        Args:
            run: Runs the head.
            k: Index of the head.
            feeds: Whether the head takes deep feedback.
            state: Where the rows stand.
        """
        self._run = run
        self._k = k
        self._feeds = feeds
        self._state = state
        self._length = state.length.copy()
        self._hidden: list[Tensor] = []
        self._before: list[Tensor] = []

    def __len__(self) -> int:
        """Positions that wait."""
        return len(self._hidden)

    def add(self, hidden: Tensor, before: Tensor) -> None:
        """Let the next position wait.

        Args:
            hidden: Its state at the checkpoint, `[rows, 1, width]`.
            before: What its predecessor ended with, likewise.
        """
        self._hidden.append(hidden)
        self._before.append(before)

    def flush(self) -> Tensor:
        """Run the head on all that wait; the last one's state, `[rows, 1, width]`."""
        if len(self) > _MANY:
            self.fill(len(self) - 1)
        hidden, before, at = self._take(len(self))
        return self._run.head(self._k, hidden, before, at)[:, -1:]

    def fill(self, count: int | None = None) -> None:
        """Let the head have seen what waits; nobody asks for its states.

        Args:
            count: How many positions, the first ones; None for all.
        """
        hidden, before, at = self._take(len(self) if count is None else count)
        self._run.fill(self._k, hidden, before, at)

    def _take(self, count: int) -> tuple[Tensor, Tensor | None, Placement]:
        rows = self._state.rows
        steps = np.tile(np.arange(count), (rows, 1))
        at = self._state.place(steps, _chain(rows, 0, count), self._length)
        before = torch.cat(self._before[:count], dim=1) if self._feeds else None
        hidden = torch.cat(self._hidden[:count], dim=1)
        del self._hidden[:count], self._before[:count]
        self._length = self._length + count
        return hidden, before, at


class OpenNodes:
    """The chain of tokens that have left and of the one on its way, each at its own depth.

    Deeper ones come first: to run a token through a layer, those before it must have been there, so
    whoever lags joins in. Weights are read once for all of them.
    """

    def __init__(
        self,
        run: RowPass,
        state: RowState,
        checkpoints: Sequence[int],
        queues: Sequence[HeadQueue],
        passing: Callable[[int, int, Tensor, Tensor | None], None] | None = None,
    ) -> None:
        """Begin with none.

        Args:
            run: Runs the layers.
            state: Where the rows stand.
            checkpoints: Layers that are run before each checkpoint, in increasing order.
            queues: What waits for each checkpoint's head.
            passing: Is told when a node comes to a checkpoint: the node, the index of the
                checkpoint, its states there, and how evenly it attends, `[rows]`, where `advance`
                was told to look.
        """
        self._passing = passing
        self._run = run
        self._state = state
        self._checkpoints = list(checkpoints)
        self._queues = queues
        self._hidden: list[Tensor] = []
        self._before: list[Tensor] = []
        self._depths: list[int] = []
        self._spread: Tensor | None = None

    def __len__(self) -> int:
        """Tokens whose layers are not all run."""
        return len(self._hidden)

    def add(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Take up the next token.

        Args:
            tokens: Token ids `[rows, 1]`.
            before: What the token before it ended with, `[rows, 1, width]`.

        Returns:
            Its embedding, `[rows, 1, width]`.
        """
        depth = np.full((self._state.rows, 1), len(self), np.int64)
        hidden = self._run.embed(tokens, self._state.positions(self._state.length, depth))
        self._hidden.append(hidden)
        self._before.append(before)
        self._depths.append(0)
        self._spread = None
        self._pass(len(self) - 1, 0)
        return hidden

    @property
    def spread(self) -> Tensor | None:
        """How evenly the last token attends in the last layer it was run through, `[rows]`.

        None where `advance` was not told to look.
        """
        return self._spread

    def advance(self, stop: int, observed: Collection[int] = ()) -> Tensor:
        """Run the last token, and whoever must come along, through layers up to `stop`.

        Args:
            stop: End of the layers.
            observed: Depths behind whose last layer it is looked at how evenly tokens attend.

        Returns:
            The last token's state there, `[rows, 1, width]`.
        """
        rows, count = self._state.rows, len(self)
        while (start := self._depths[-1]) < stop:
            first = self._depths.index(start)
            bounds = [stop, *(c for c in self._checkpoints if c > start)]
            end = min(bounds if first == 0 else [*bounds, self._depths[first - 1]])
            steps = np.tile(np.arange(first, count), (rows, 1))
            at = self._state.place(steps, _chain(rows, first, count))
            hidden = torch.cat(self._hidden[first:], dim=1)
            spread = Spread() if end in observed else None
            hidden = self._run.layers(hidden, at, start, end, spread=spread)
            risks = None if spread is None else spread.risk
            self._spread = None if risks is None else risks[:, -1]
            for node in range(first, count):
                place = node - first
                self._hidden[node] = hidden[:, place : place + 1]
                self._depths[node] = end
                self._pass(node, end, None if risks is None else risks[:, place])
        return self._hidden[-1]

    @property
    def states(self) -> list[Tensor]:
        """State of each token at the depth it has come to, `[rows, 1, width]` each."""
        return self._hidden

    def close(self) -> None:
        """Count all tokens as settled; they have been through every layer."""
        self._state.length = self._state.length + len(self)
        self._hidden, self._before, self._depths = [], [], []

    def _pass(self, node: int, depth: int, spread: Tensor | None = None) -> None:
        """Put a token that has come to a checkpoint in its head's queue."""
        if depth in self._checkpoints:
            k = self._checkpoints.index(depth)
            self._queues[k].add(self._hidden[node], self._before[node])
            if self._passing is not None:
                self._passing(node, k, self._hidden[node], spread)


def _chain(rows: int, first: int, count: int) -> npt.NDArray[np.bool_]:
    """Each node sees itself and those before it, `[rows, count - first, count]`."""
    lower = np.tri(count, dtype=np.bool_)[first:]
    return np.broadcast_to(lower, (rows, *lower.shape)).copy()
