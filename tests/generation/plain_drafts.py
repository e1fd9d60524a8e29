"""Draft trees and lookups in plain Python, against which those of the core are held."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sedac_hf.generation.draft_tree import BLANK, HEAD, LOOKUP, ROOT

__all__ = ["PlainTree", "plain_continuation"]


class _Candidate(NamedTuple):
    """A node that may yet be taken; the heap gives the most probable first."""

    cost: float  # minus its probability
    order: int
    parent: int
    token: int
    origin: int
    rank: int
    rest: tuple[tuple[int, float], ...]  # what follows it on a path that was found as a whole


class PlainTree:
    """Nodes in the order in which they were taken; a parent always stands before its children.

    Attributes:
        tokens: Token of each node; node 0 is the root, the last token of the text.
        parents: Parent of each node, -1 for the root.
        scores: Probability that the node's whole path is what the base says.
        depths: Steps from the root.
        origins: `ROOT`, `HEAD`, `LOOKUP` or `BLANK`.
        ranks: Place among its parent's candidates, from 0.
        expanded: Nodes whose children an exit head was asked for.
        matched: Tokens that matched where a continuation was found in the text, else 0.
    """

    def __init__(self, root: int, limit: int, *, chain: bool = False) -> None:
        """Begin with the root alone.

        Args:
            root: The last token of the text.
            limit: Largest depth that may be of use; 0 for no drafts.
            chain: Whether each node may have one child only.
        """
        self.tokens, self.parents, self.scores = [root], [-1], [1.0]
        self.depths, self.origins, self.ranks = [0], [ROOT], [0]
        self.expanded: set[int] = set()
        self.matched = 0
        self._limit = limit
        self._chain = chain
        self._children: dict[tuple[int, int], int] = {}
        self._pending: list[_Candidate] = []
        self._offers = 0

    def __len__(self) -> int:
        """Nodes, blanks included."""
        return len(self.tokens)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with a token, or None."""
        return self._children.get((node, token))

    def offer(self, parent: int, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """Put up an exit's candidates behind a node.

        Args:
            parent: The node.
            tokens: Candidates, the most probable first.
            probabilities: What the exit gives them; what is not finite is left out.
        """
        self.expanded.add(parent)
        ended = self._chain and parent != len(self) - 1
        if ended or self.depths[parent] >= self._limit:
            return
        for rank, (token, probability) in enumerate(zip(tokens, probabilities, strict=True)):
            score = self.scores[parent] * probability
            if score > 0 and np.isfinite(score):
                self._push(score, parent, token, HEAD, rank, ())

    def offer_path(self, tokens: Sequence[int], scores: Sequence[float], matched: int) -> None:
        """Put up a continuation of the root that was found as a whole.

        Args:
            tokens: Its tokens.
            scores: Probability that each, with all before it, is right.
            matched: Tokens that matched where it was found.
        """
        self.matched = matched
        path = tuple(zip(tokens, scores, strict=True))
        self._follow(0, path)

    def take(self, count: int, least: float = 0.0, known: int | None = None) -> list[int]:
        """Make nodes of the most probable candidates.

        Args:
            count: How many at most.
            least: Probability below which a candidate is not worth a place.
            known: Take only candidates whose parent is among the first `known` nodes.

        Returns:
            The new nodes.
        """
        taken: list[int] = []
        put_off: list[_Candidate] = []
        while self._pending and len(taken) < count and -self._pending[0].cost >= least:
            best = heapq.heappop(self._pending)
            if known is not None and best.parent >= known:
                put_off.append(best)
                continue
            node = self._children.get((best.parent, best.token))
            if node is None:
                node = self._add(best)
                taken.append(node)
                if self._chain:
                    self._drop_rivals(best, node)
            self._follow(node, best.rest)
        for candidate in put_off:
            heapq.heappush(self._pending, candidate)
        return taken

    def next_scores(self, count: int) -> list[float]:
        """Probabilities of the best candidates, the best first."""
        return [-candidate.cost for candidate in heapq.nsmallest(count, self._pending)]

    def all_scores(self, count: int) -> list[float]:
        """Probabilities of all that could be verified."""
        return self.scores + self.next_scores(1 if self._chain else count)

    def cut(self, nodes: int) -> None:
        """Give up the nodes taken last, until `nodes` are left."""
        while len(self.tokens) > nodes:
            token, parent = self.tokens.pop(), self.parents.pop()
            self._children.pop((parent, token), None)
            for kept in (self.scores, self.depths, self.origins, self.ranks):
                kept.pop()

    def pad(self, nodes: int) -> None:
        """Fill up with blank nodes, which are never accepted; a chain ends before them."""
        if self._chain and len(self.tokens) < nodes:
            self._limit, self._pending = 0, []
        while len(self.tokens) < nodes:
            self.tokens.append(self.tokens[0])
            self.parents.append(0)
            self.scores.append(0.0)
            self.depths.append(1)
            self.origins.append(BLANK)
            self.ranks.append(0)

    def _drop_rivals(self, best: _Candidate, node: int) -> None:
        """Give up what else might have followed a parent; paths through the new node go on."""
        rivals, self._pending = self._pending, []
        for rival in rivals:
            if (rival.parent, rival.token) == (best.parent, best.token):
                self._follow(node, rival.rest)

    def _follow(self, node: int, path: tuple[tuple[int, float], ...]) -> None:
        if path and self.depths[node] < self._limit:
            (token, score), rest = path[0], path[1:]
            self._push(score, node, token, LOOKUP, 0, rest)

    def _push(
        self,
        score: float,
        parent: int,
        token: int,
        origin: int,
        rank: int,
        rest: tuple[tuple[int, float], ...],
    ) -> None:
        self._offers += 1
        candidate = _Candidate(-score, self._offers, parent, token, origin, rank, rest)
        heapq.heappush(self._pending, candidate)

    def _add(self, best: _Candidate) -> int:
        node = len(self.tokens)
        self.tokens.append(best.token)
        self.parents.append(best.parent)
        self.scores.append(-best.cost)
        self.depths.append(self.depths[best.parent] + 1)
        self.origins.append(best.origin)
        self.ranks.append(best.rank)
        self._children[best.parent, best.token] = node
        return node


def plain_continuation(
    text: npt.NDArray[np.int64], most: int, longest: int = 4, shortest: int = 2
) -> tuple[list[int], int] | None:
    """As `find_continuation`: the tokens that followed, and how many matched."""
    length = len(text)
    if most < 1 or length <= shortest:
        return None
    # Occurrences of the last token that have something behind them; longer matches end there too.
    ends = np.flatnonzero(text[: length - 1] == text[-1])
    best: tuple[int, int] | None = None
    for size in range(2, longest + 1):
        ends = ends[ends >= size - 1]
        ends = ends[text[ends - (size - 1)] == text[length - size]]
        if not len(ends):
            break
        if size >= shortest:
            best = int(ends[-1]), size
    if best is None:
        return None
    end, matched = best
    return text[end + 1 : end + 1 + most].tolist(), matched
