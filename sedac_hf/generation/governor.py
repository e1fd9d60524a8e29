"""How much to draft: what is worth its time by measured costs and by what was accepted so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sedac_hf._core import DraftPlan
from sedac_hf.generation.costs import PassCosts, Tally
from sedac_hf.generation.cycle import HIT_NODES, ROWS_SHARE, Cycle, off_cycle, one_level
from sedac_hf.generation.draft_tree import HEAD, LOOKUP

if TYPE_CHECKING:
    from sedac_hf.generation.draft_tree import DraftTree

__all__ = ["Governor"]

_DEEPEST = 8  # depths that are told apart
_LONGEST = 4  # matched tokens of a lookup that are told apart
_TRIAL = 12  # cycles that drafting is tried for before it is judged
_PROBE = 6  # cycles of a later try
_FIRST_WAIT, _LONGEST_WAIT = 64, 1024  # cycles without drafts between tries
# While drafts are made, cycles between two without: what those take is only known by doing them.
_FIRST_LOOK, _LONGEST_LOOK = 4, 128
# Drafting must promise this much more than doing without, since estimates are noisy.
_MARGIN = 1.02
# What no head's first eight candidates have been seen to hold more often, given true states.
_BEST_COVER = 0.75


class Governor:
    """Decides for one head (or none) at one batch size; lives as long as the model.

    Times are in seconds, and only compared with each other.
    """

    def __init__(
        self,
        full: PassCosts,
        tail: PassCosts | None = None,
        level: float = 0.0,
        *,
        most_nodes: int = 16,
        most_levels: int = 4,
        width: int = 2,
        rows: int = 1,
        hits: Sequence[float] | None = None,
        off: tuple[Tally, Tally] | None = None,
    ) -> None:
        """Begin with measured costs.

        Args:
            full: What passes through all layers take.
            tail: The same from the head's checkpoint on; None without a head.
            level: Seconds of one call of the head, early layers and draft logits included.
            most_nodes: Nodes verified at most.
            most_levels: Calls of the head at most.
            width: Nodes that each level behind the first expands; 1 where drafts are chains.
            rows: Rows of the batch.
            hits: How often the base's choice was found among the head's first 1, 2, 4 and 8; then
                nothing needs to be tried before it is judged. None if nobody knows.
            off: Tokens and seconds of a cycle without the head, as `off_cycle` begins them; shared
                by the heads of a batch size, which are all compared with the same.
        """
        self.most_nodes, self.most_levels, self.width = most_nodes, most_levels, width
        self._full = full
        self._tail = tail
        self._level = [Tally(level, 2.0, 0.9) for _ in range(most_levels)]
        self._off = off_cycle(full) if off is None else off
        # Of what drafts bring the rows on average, what the row furthest behind has of it.
        self._share = Tally(1.0 if rows == 1 else ROWS_SHARE, 4.0, 0.98)
        self._rest = {on: Tally(0.0, 0.01, 0.95) for on in (True, False)}
        self._start_over()
        guesses = {matched: 1 - 0.6**matched for matched in range(1, _LONGEST + 1)}
        self._found = {
            matched: [Tally(guess, 4.0, 0.99) for _ in range(_DEEPEST + 1)]
            for matched, guess in guesses.items()
        }
        self._lock = threading.Lock()
        self._plan: DraftPlan | None = None
        self._cycles = self._tried = self._since_try = 0
        self._wait = _FIRST_WAIT
        self._look, self._since_look = _FIRST_LOOK, 0
        self._left = _TRIAL if tail is not None else 0
        self._hits: Sequence[float] | None = None
        if tail is not None and not self._can_pay(tail, level):
            # At this batch size not even the best of heads would be worth a trial.
            self._expect(tail, (0.0,) * len(HIT_NODES))
        elif tail is not None and hits is not None:
            self._hits = hits
            self._expect(tail, hits)

    def _expect(self, tail: PassCosts, hits: Sequence[float]) -> None:
        """Begin with what one level of drafts would bring at the rates that `fit` has seen."""
        self._hope(tail, hits, 8.0, 3.0)
        self._left, self._tried = 0, _TRIAL
        # Where nodes are dear a try costs several passes, and little speaks for one.
        self._wait = _FIRST_WAIT if self.is_on else _LONGEST_WAIT

    def _hope(
        self, tail: PassCosts, hits: Sequence[float], tokens_weight: float, seconds_weight: float
    ) -> None:
        """Take one level of drafts at these rates for so many cycles that were seen."""
        tokens, seconds = one_level(tail, self.level, hits, self.share)
        self._on = (Tally(tokens, tokens_weight), Tally(seconds, seconds_weight))

    def _can_pay(self, tail: PassCosts, level: float) -> bool:
        """Whether drafts could be worth their time if the head were as good as heads can be."""
        tokens, best = 1.0, 0.0
        for levels in range(1, self.most_levels + 1):
            tokens += _BEST_COVER**levels
            best = max(best, tokens / max(levels * level + tail.of(levels + 1), 1e-9))
        return best > _MARGIN * self._rate_off

    def _start_over(self) -> None:
        """Take nothing for granted of what the head is worth."""
        self._on = (Tally(1.0, 0.01), Tally(1.0, 0.01))  # tokens, seconds a cycle
        # Share of what the head gives a child that is accepted, once its parent is, by depth.
        self._trust = [Tally(1.0, 20.0, 0.995) for _ in range(_DEEPEST + 1)]
        # Share of accepted and expanded nodes one of whose children is accepted, by depth.
        self._covered = [Tally(0.5, 4.0, 0.99) for _ in range(_DEEPEST + 1)]

    @property
    def rate(self) -> float:
        """Tokens a row gains per second, by the better of the two ways so far."""
        return self._rate_on if self.is_on else self._rate_off

    @property
    def _rate_off(self) -> float:
        return self._off[0].value / max(self._off[1].value, 1e-9)

    @property
    def _rate_on(self) -> float:
        return self._on[0].value / max(self._on[1].value, 1e-9)

    @property
    def share(self) -> float:
        """Of what drafts bring the rows on average, what the row furthest behind has of it."""
        return min(max(self._share.value, 0.0), 1.0)

    @property
    def is_on(self) -> bool:
        """Whether drafting with the head has been found to pay."""
        return self._tried >= _TRIAL and self._rate_on > _MARGIN * self._rate_off

    @property
    def is_undecided(self) -> bool:
        """Whether the first trial of the head is still to be ended."""
        return self._tail is not None and self._tried < _TRIAL

    @property
    def level(self) -> float:
        """Seconds of the head's first call in a cycle."""
        return self._level[0].value

    @property
    def promise(self) -> float:
        """Tokens a row gains per second when this head may draft."""
        return self._rate_on

    def alike(self, most: int) -> int:
        """How many cycles from here on would begin alike, if nothing were learned meanwhile.

        Args:
            most: What is enough.
        """
        with self._lock:
            if self._tail is None:
                return most
            if self._left > 0:
                return 1  # on trial each cycle is learned from
            until = self._wait - self._since_try - 1
            if self.is_on:
                until = self._look - self._since_look
            return min(max(until, 1), most)

    def begin(self) -> Cycle:
        """Start a cycle; says whether the head may be asked."""
        with self._lock:
            self._plan = None
            return self._begin()

    def _begin(self) -> Cycle:
        self._cycles += 1
        if self._tail is None:
            return Cycle()
        if self._left > 0 or self.is_on:
            return self._begin_drafting()
        self._look, self._since_look = _FIRST_LOOK, 0
        self._since_try += 1
        if self._since_try >= self._wait:
            self._since_try, self._left = 0, _PROBE - 1
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
            # Text changes: what was learned of the text before would keep the head from its try.
            self._start_over()
            if self._tail is not None and self._hits is not None:
                self._hope(self._tail, self._hits, 2.0, 1.0)
            return Cycle(on=True)
        return Cycle()

    def _begin_drafting(self) -> Cycle:
        """With drafts, but now and then without, to see what that takes now."""
        if self._since_look >= self._look:
            self._since_look, self._look = 0, min(2 * self._look, _LONGEST_LOOK)
            return Cycle()
        self._since_look += 1
        if self._left > 0:
            self._left -= 1
        else:
            self._wait = _FIRST_WAIT
        return Cycle(on=True)

    def plan(self) -> DraftPlan:
        """How much to draft, by what is known as this cycle begins."""
        plan = self._plan
        if plan is None:
            # No tree has more nodes than this: what drafts put up, or what all levels must have.
            sizes = range(1, max(self.most_nodes, 1 + self.most_levels * self.width) + 1)
            plan = self._plan = DraftPlan(
                most_nodes=self.most_nodes,
                most_levels=self.most_levels,
                width=self.width,
                trust=[each.value for each in self._trust],
                covered=[each.value for each in self._covered],
                found=[[each.value for each in own] for own in self._found.values()],
                levels=[each.value for each in self._level],
                full=self._full.of_all(sizes),
                tail=None if self._tail is None else self._tail.of_all(sizes),
                rate=self.rate,
                share=self.share,
            )
        return plan

    def trust(self, depth: int) -> float:
        """See `DraftPlan.trust`."""
        return self.plan().trust(depth)

    def found_scores(self, matched: int, count: int) -> list[float]:
        """See `DraftPlan.found_scores`."""
        return self.plan().found_scores(matched, count)

    def worth_asking(self, promise: float) -> bool:
        """See `DraftPlan.worth_asking`."""
        return self.plan().worth_asking(promise)

    def worth_a_level(
        self,
        level: int,
        scores: Sequence[Sequence[float]],
        next_scores: Sequence[Sequence[float]],
    ) -> bool:
        """See `DraftPlan.worth_a_level`."""
        return self.plan().worth_a_level(level, scores, next_scores)

    def best_size(self, scores: Sequence[Sequence[float]], least: int, drafted: bool) -> int:
        """See `DraftPlan.best_size`."""
        return self.plan().best_size(scores, least, drafted)

    def end(self, cycle: Cycle, trees: Sequence[DraftTree], paths: Sequence[Sequence[int]]) -> None:
        """Learn from a cycle.

        Args:
            cycle: How it went.
            trees: The trees of the rows that took part.
            paths: Their accepted nodes, the root first.
        """
        with self._lock:
            self._end(cycle, trees, paths)

    def _end(
        self, cycle: Cycle, trees: Sequence[DraftTree], paths: Sequence[Sequence[int]]
    ) -> None:
        self._plan = None
        if cycle.is_whole:
            self._time(cycle)
        self._tried += cycle.on
        for tree, path in zip(trees, paths, strict=True):
            if cycle.drafted or len(tree) > 1:
                self._learn(tree, set(path), cycle.drafted)

    def _time(self, cycle: Cycle) -> None:
        """What the cycle took, and what it brought."""
        costs = self._tail if cycle.drafted and self._tail is not None else self._full
        costs.add(cycle.nodes, cycle.verify)
        for level, seconds in enumerate(cycle.levels[: self.most_levels]):
            self._level[level].add(min(seconds, 3 * self._level[level].value or seconds))
        way = self._on if cycle.on else self._off
        mean = cycle.tokens / max(cycle.rows, 1)
        gain = mean if cycle.gain is None else cycle.gain
        way[0].add(gain)
        self._share.add(gain - 1, mean - 1)
        rest = self._rest[cycle.on]
        rest.add(min(cycle.rest, 3 * rest.value or cycle.rest))
        # Both ways by the clock, which smoothed costs flatter; but one hiccup must not decide.
        usual = sum(self._level[i].value for i in range(min(len(cycle.levels), self.most_levels)))
        usual += costs.of(cycle.nodes) + rest.value
        spent = min(sum(cycle.levels) + cycle.verify + cycle.rest, 1.5 * usual)
        way[1].add(spent)

    def _learn(self, tree: DraftTree, kept: set[int], drafted: bool) -> None:
        """Which of the nodes whose parent was accepted were right themselves."""
        # Each attribute of a tree is a list made anew.
        parents, depths, scores = tree.parents, tree.depths, tree.scores
        for node, origin in enumerate(tree.origins):
            parent, depth = parents[node], min(depths[node], _DEEPEST)
            if parent not in kept:
                continue
            chance = scores[node] / max(scores[parent], 1e-9)
            if origin == HEAD and chance > 0:
                trust = min(self._trust[depth].value, 1.0)
                self._trust[depth].add(float(node in kept), chance / max(trust, 1e-3))
            elif origin == LOOKUP:
                self._found[min(tree.matched, _LONGEST)][depth].add(float(node in kept))
        if not drafted:
            return
        for node in kept & tree.expanded:
            depth = min(depths[node] + 1, _DEEPEST)
            self._covered[depth].add(float(any(parents[child] == node for child in kept)))

    def to_dict(self) -> dict[str, Any]:
        """What it has measured and decided, as JSON values."""
        return {
            "drafting": self.is_on or self._left > 0,
            "cycles": self._cycles,
            "cycles_drafted": self._tried,
            "share_of_last_row": self.share,
            "rate_drafting": self._rate_on if self._tried else None,
            "rate_without": self._rate_off,
            "pass_ms": _in_ms(self._full),
            "tail_ms": None if self._tail is None else _in_ms(self._tail),
            "level_ms": [1e3 * each.value for each in self._level],
            "covered_by_depth": [each.value for each in self._covered[1:]],
        }


def _in_ms(costs: PassCosts) -> dict[int, float]:
    return {nodes: 1e3 * seconds for nodes, seconds in costs.to_dict().items()}
