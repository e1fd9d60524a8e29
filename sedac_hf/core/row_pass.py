"""The seam between loops that draft, settle or verify and whatever runs the layers for them.

A loop works on rows (one per sequence) with a cache of slots. The first `length` slots of a row are
settled: every later position sees them. Behind them stand open nodes: a chain of tokens to be
settled, or a tree of drafts. One call runs some nodes of every row from one layer to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.narrow_tail import KeptChannels

__all__ = ["BASE", "Placement", "RowPass"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

BASE = -1  # the base's own layers, where a part is asked for; heads are 0, 1, ...


@dataclass(frozen=True)
class Placement:
    """Where the `n` nodes of a call stand.

    Node `j` of row `r` has its K/V in slot ``length[r] + open - n + j``: the nodes of a call are
    the last of those that are open. It sees the settled slots ``first[r] .. length[r] - 1`` and
    the open nodes that `tree` names, itself among them.

    Attributes:
        first: First slot that is no padding, `[rows]`.
        length: Settled slots, `[rows]`.
        positions: Position ids of the nodes, `[rows, n]`.
        tree: Which open nodes each node sees, `[rows, n, open]`.
    """

    first: IntArray
    length: IntArray
    positions: IntArray
    tree: Mask

    def of(self, rows: IntArray) -> Placement:
        """The same for some rows.

        Args:
            rows: Which, in ascending order.
        """
        return Placement(self.first[rows], self.length[rows], self.positions[rows], self.tree[rows])

    @property
    def nodes(self) -> int:
        """Nodes of the call, `n`."""
        return int(self.positions.shape[1])

    @property
    def open(self) -> int:
        """Open nodes, those of the call included."""
        return int(self.tree.shape[2])

    @property
    def slots(self) -> IntArray:
        """Slot of each node, `[rows, n]`."""
        behind = np.arange(self.open - self.nodes, self.open)
        return self.length[:, None] + behind[None, :]


class RowPass(Protocol):
    """Runs nodes through the base and the exit heads, with K/V of its own.

    A part of the cache is `BASE` or the index of a head; each part has its own settled slots, which
    the loop counts. A slot may be written again: what stood there is replaced.
    """

    @property
    def holds_trees(self) -> bool:
        """Whether open nodes may form a tree.

        Where not they are chains: each node sees those before it, a chain's beginning is kept.
        """
        ...

    def rest(self, done: Mask) -> None:
        """Spare rows whose texts have ended; nobody asks for their states or K/V any more.

        Args:
            done: Which rows, `[rows]`; holds until the next call.
        """
        ...

    def load(self, cache: Any) -> IntArray:
        """Take over a transformers cache after a prompt, exit heads' layers included.

        Args:
            cache: The cache; it is not changed.

        Returns:
            Slots of each row that hold something, padding included, `[rows]`.
        """
        ...

    def store(self, cache: Any, length: IntArray, *, heads: bool = True) -> None:
        """Append to a transformers cache what was settled since `load`.

        Args:
            cache: The cache that was loaded.
            length: Settled slots of each row, `[rows]`; shorter rows are padded on the right.
            heads: Whether the exit heads' parts have followed the base's; if not, their layers are
                left behind, which later calls notice.
        """
        ...

    def embed(self, tokens: Tensor, positions: IntArray) -> Tensor:
        """What the first layer is given.

        Args:
            tokens: Token ids `[rows, n]`.
            positions: Position ids `[rows, n]`.

        Returns:
            States `[rows, n, width]`.
        """
        ...

    def layers(
        self,
        hidden: Tensor,
        at: Placement,
        start: int,
        stop: int,
        kept: KeptChannels | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """Run the base's layers `start` to `stop - 1`.

        Args:
            hidden: States `[rows, n, width]`.
            at: Where the nodes stand.
            start: First layer.
            stop: End of the layers.
            kept: How much of the MLPs each node runs; None for all.
            spread: Takes how evenly the last of these layers attends; None where nobody asks.

        Returns:
            States after layer `stop - 1`, same shape.
        """
        ...

    def head(self, k: int, hidden: Tensor, feedback: Tensor | None, at: Placement) -> Tensor:
        """Run exit head `k`.

        Args:
            k: Index of the head.
            hidden: States at its checkpoint, `[rows, n, width]`.
            feedback: Final-layer states of each node's predecessor, same shape; None for a head
                without feedback.
            at: Where the nodes stand in the head's own cache.

        Returns:
            States for the final norm, same shape.
        """
        ...

    def fill(self, k: int, hidden: Tensor, feedback: Tensor | None, at: Placement) -> None:
        """Only write the K/V that `head` would write.

        Args:
            k: Index of the head.
            hidden: As for `head`.
            feedback: As for `head`.
            at: As for `head`.
        """
        ...

    def catch_up(self) -> None:
        """Write now what heads' K/V lack of the prompt, where that waits until one is asked.

        Nobody needs to call it; whoever times a head's first call wants to.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The base's norm and head.

        Args:
            hidden: States after the last layer, `[rows, n, width]`.

        Returns:
            Logits `[rows, n, vocabulary]`.
        """
        ...

    def best(self, hidden: Tensor) -> tuple[IntArray, Mask]:
        """The word with the largest of these logits, the first of equal ones.

        Args:
            hidden: As for `logits`.

        Returns:
            Words, and whether their logits are finite, `[rows, n]` each.
        """
        ...

    def draft_top(self, hidden: Tensor, count: int) -> tuple[IntArray, FloatArray]:
        """The most probable words of the draft vocabulary, the best first.

        Args:
            hidden: States for the final norm, `[rows, n, width]`.
            count: Words of each node; no more than there are.

        Returns:
            Their places in the draft vocabulary, and their probabilities in it, NaN where a logit
            is not a number, `[rows, n, count]` each.
        """
        ...

    def keep(self, part: int, length: IntArray, path: IntArray, counts: IntArray) -> None:
        """Move the K/V of accepted nodes together, so that they can be counted as settled.

        Args:
            part: `BASE` or the index of a head.
            length: Settled slots before, `[rows]`.
            path: Open nodes that stay, in order, `[rows, most]`; behind a row's own count anything.
            counts: How many stay, `[rows]`.
        """
        ...
