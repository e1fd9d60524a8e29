"""What the governor decides, against a simulated machine and a simulated exit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from sedac_hf.generation.costs import PassCosts, Tally
from sedac_hf.generation.draft_tree import DraftTree
from sedac_hf.generation.governor import Governor

SIZES = (1, 2, 4, 8, 16)


def flat(nodes: int) -> float:
    """A pass bound by memory: eight nodes for the price of one."""
    return 10.0 if nodes <= 8 else 10.0 + 0.5 * (nodes - 8)


def steep(nodes: int) -> float:
    """A pass bound by arithmetic."""
    return 4.0 + 6.0 * nodes


@dataclass
class Machine:
    """Passes and levels that take what they take, and an exit that is right so often."""

    cost: Callable[[int], float]
    level: float
    right: float  # the base says the exit's first choice
    hits: Sequence[float] | None = None
    spent: float = 0.0
    tokens: int = 0
    drafted: list[bool] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def governor(self) -> Governor:
        full = PassCosts({nodes: self.cost(nodes) for nodes in SIZES})
        return Governor(full, full, self.level, hits=self.hits)

    def cycle(self, governor: Governor) -> None:
        """As the loop does it, the base agreeing with the first candidate so often."""
        cycle, tree = governor.begin(), DraftTree(0, limit=8)
        if cycle.on and governor.worth_asking(1.0):
            cycle.drafted = True
            self._offer(tree, 0, governor)
            cycle.levels.append(self.level)
            while True:
                level = len(cycle.levels)
                scores = tree.all_scores(governor.most_nodes)
                next_ones = tree.next_scores(governor.width)
                if not governor.worth_a_level(level, [scores], [next_ones]):
                    break
                for node in tree.take(governor.width):
                    self._offer(tree, node, governor)
                cycle.levels.append(self.level)
        least = len(tree)
        tree.take(governor.most_nodes - least)
        tree.cut(governor.best_size([tree.scores], least, cycle.drafted))
        path = [0]
        while self.random.random() < self.right:
            child = tree.child(path[-1], 1)
            if child is None:
                break
            path.append(child)
        cycle.nodes, cycle.tokens = len(tree), len(path)
        cycle.verify = self.cost(len(tree))
        self.spent += cycle.verify + sum(cycle.levels)
        self.tokens += len(path)
        self.drafted.append(cycle.drafted)
        self.sizes.append(len(tree))
        governor.end(cycle, [tree], [path])

    def _offer(self, tree: DraftTree, node: int, governor: Governor) -> None:
        trust = governor.trust(tree.depths[node] + 1)
        rest = (1 - self.right) / 4
        chances = [self.right, rest, rest / 2, rest / 4]
        tree.offer(node, [1, 2, 3, 4], [chance * trust for chance in chances])

    def run(self, governor: Governor, cycles: int) -> float:
        """Speed against doing without drafts, over these cycles alone."""
        spent, tokens = self.spent, self.tokens
        for _ in range(cycles):
            self.cycle(governor)
        return (self.tokens - tokens) * self.cost(1) / (self.spent - spent)


@pytest.mark.parametrize(("right", "least"), [(0.5, 1.3), (0.8, 2.0)])
def test_a_good_exit_pays_where_width_is_free(right: float, least: float) -> None:
    machine = Machine(flat, 1.0, right)
    governor = machine.governor()
    assert machine.run(governor, 300) > least
    assert governor.is_on
    assert max(machine.sizes[100:]) > 3


@pytest.mark.parametrize("cost", [flat, steep])
def test_an_exit_that_is_never_right_costs_next_to_nothing(cost: Callable[[int], float]) -> None:
    machine = Machine(cost, 1.0, 0.0)
    governor = machine.governor()
    machine.run(governor, 100)
    assert not governor.is_on
    assert machine.run(governor, 2000) > 0.98


def test_a_fair_exit_is_left_alone_where_width_costs() -> None:
    machine = Machine(steep, 8.0, 0.3)
    governor = machine.governor()
    machine.run(governor, 200)
    assert machine.run(governor, 2000) > 0.98
    assert sum(machine.drafted[200:]) < 200


def test_it_is_tried_again_and_switched_on_when_text_gets_easy() -> None:
    machine = Machine(flat, 1.0, 0.0)
    governor = machine.governor()
    machine.run(governor, 200)
    assert not governor.is_on
    machine.right = 0.8
    machine.run(governor, 2000)
    assert governor.is_on
    assert machine.run(governor, 200) > 1.5


@pytest.mark.parametrize("cost", [flat, steep])
def test_a_head_that_does_not_hold_what_fit_saw_costs_next_to_nothing(
    cost: Callable[[int], float],
) -> None:
    machine = Machine(cost, 1.0, 0.0, hits=HITS)
    governor = machine.governor()
    machine.run(governor, 300)
    assert not governor.is_on
    assert machine.run(governor, 4000) > 0.98


def test_a_head_known_to_be_good_comes_back_after_a_hard_passage() -> None:
    machine = Machine(flat, 1.0, 0.0, hits=HITS)
    governor = machine.governor()
    machine.run(governor, 200)
    assert not governor.is_on
    machine.right = 0.45
    machine.run(governor, 400)
    assert governor.is_on
    assert machine.run(governor, 300) > 1.2


def test_it_is_switched_off_when_text_gets_hard() -> None:
    machine = Machine(flat, 3.0, 0.8)
    governor = machine.governor()
    machine.run(governor, 200)
    assert governor.is_on
    machine.right = 0.0
    machine.run(governor, 300)
    assert not governor.is_on


def test_dear_levels_make_shallow_trees() -> None:
    cheap, dear = Machine(flat, 0.2, 0.6), Machine(flat, 4.0, 0.6)
    depths = []
    for machine in (cheap, dear):
        governor = machine.governor()
        machine.run(governor, 200)
        level, line = int(governor.worth_asking(1.0)), [1.0, 0.6]
        while governor.worth_a_level(level, [line], [line[-1:]]):
            level, line = level + 1, [*line, 0.6 * line[-1]]
        depths.append(level)
    assert depths[0] > depths[1]


def test_sure_candidates_make_larger_trees() -> None:
    governor = Machine(steep, 1.0, 0.5).governor()
    sure, doubtful = [1.0, 0.9, 0.8, 0.7], [1.0, 0.2, 0.1, 0.05]
    assert governor.best_size([sure], 1, drafted=True) > 1
    assert governor.best_size([doubtful], 1, drafted=True) == 1
    assert governor.best_size([doubtful], 3, drafted=True) == 3


def test_what_is_found_in_the_text_is_believed_by_how_often_it_was_right() -> None:
    governor = Governor(PassCosts({1: 10.0, 8: 10.0}))
    before = governor.found_scores(3, 4)
    for _ in range(50):
        cycle, tree = governor.begin(), DraftTree(0, limit=8)
        tree.offer_path([5, 6], governor.found_scores(3, 2), 3)
        nodes = tree.take(8)
        governor.end(cycle, [tree], [[0, nodes[0]]])
    after = governor.found_scores(3, 4)
    assert after[0] > before[0]
    assert after[1] < before[1] / 2
    assert governor.found_scores(2, 1)[0] < before[0]


def test_without_a_head_there_is_nothing_to_try() -> None:
    governor = Governor(PassCosts({1: 10.0}))
    assert not any(governor.begin().on for _ in range(200))


def test_costs_lie_between_those_that_were_seen() -> None:
    costs = PassCosts({1: 10.0, 4: 16.0, 8: 16.0})
    assert [costs.of(n) for n in (1, 2, 4, 6, 8)] == [10.0, 12.0, 16.0, 16.0, 16.0]
    assert costs.of(16) == 16.0
    steep_end = PassCosts({1: 10.0, 2: 12.0})
    assert steep_end.of(4) == 16.0
    assert PassCosts({4: 3.0}).of(9) == 3.0


def test_one_hiccup_moves_no_cost_far_and_all_follow_a_slow_machine() -> None:
    costs = PassCosts({1: 10.0, 8: 10.0})
    costs.add(8, 1000.0)
    assert costs.of(8) < 16
    for _ in range(60):
        costs.add(8, 20.0)
    assert costs.of(8) == pytest.approx(20, rel=0.05)
    assert costs.of(1) == pytest.approx(10 * 2**0.5, rel=0.05)


def test_a_tally_forgets_its_guess() -> None:
    tally = Tally(0.9, 4.0)
    for _ in range(200):
        tally.add(0.0)
    assert tally.value < 0.01
    tally.add(5.0, 0.0)
    assert tally.value < 0.01


HITS = (0.4, 0.5, 0.6, 0.7)


def costs(cost: Callable[[int], float]) -> PassCosts:
    return PassCosts({nodes: cost(nodes) for nodes in SIZES})


def test_what_fit_has_measured_spares_the_trial() -> None:
    """Where drafts pay they begin at once, elsewhere not at all, and both may prove wrong."""
    pays = Governor(costs(flat), costs(flat), 1.0, hits=HITS)
    assert not pays.is_undecided
    assert pays.is_on
    assert pays.begin().on
    assert pays.promise == pytest.approx(1.7 / (1.0 + flat(9)))
    dear = Governor(costs(steep), costs(steep), 8.0, hits=HITS)
    assert not dear.is_undecided
    assert not any(dear.begin().on for _ in range(1000))
    machine = Machine(flat, 1.0, 0.0)
    machine.run(pays, 300)
    assert not pays.is_on
    assert machine.run(pays, 1000) > 0.97


def test_a_head_that_cannot_pay_at_all_is_not_tried() -> None:
    hopeless = Governor(costs(steep), costs(steep), 20.0)
    assert not hopeless.is_undecided
    assert not any(hopeless.begin().on for _ in range(500))
    assert Governor(costs(flat), costs(flat), 1.0).begin().on


def test_a_batch_gains_what_the_row_furthest_behind_gains() -> None:
    """Three tokens a cycle for one row and one for the other: the batch ends no sooner."""
    uneven, even = (Governor(costs(flat), costs(flat), 2.0, rows=2) for _ in range(2))
    tree = DraftTree(0, limit=8)
    for governor, gain in ((uneven, 1.0), (even, 2.0)):
        for _ in range(60):
            cycle = governor.begin()
            cycle.drafted, cycle.levels, cycle.nodes = cycle.on, [2.0] * cycle.on, 4
            cycle.rows, cycle.tokens, cycle.gain = 2, 4 if cycle.on else 2, gain
            if not cycle.on:
                cycle.gain, cycle.nodes = 1.0, 1
            cycle.verify = flat(cycle.nodes)
            governor.end(cycle, [tree, tree], [[0], [0]])
    assert even.is_on
    assert even.share == pytest.approx(1.0, abs=0.05)
    assert not uneven.is_on
    assert uneven.share < 0.3


def test_time_outside_of_passes_counts() -> None:
    idle, busy = (Governor(costs(flat), costs(flat), 1.0, hits=HITS) for _ in range(2))
    tree = DraftTree(0, limit=8)
    for governor, rest in ((idle, 0.0), (busy, 20.0)):
        for _ in range(100):
            cycle = governor.begin()
            cycle.drafted, cycle.levels, cycle.nodes = cycle.on, [1.0] * cycle.on, 5
            cycle.tokens = 2 if cycle.on else 1
            cycle.verify, cycle.rest = flat(5), rest if cycle.on else 0.0
            governor.end(cycle, [tree], [[0]])
    assert idle.is_on
    assert not busy.is_on


def test_what_going_without_takes_is_looked_at_while_drafts_are_made() -> None:
    """Passes were timed at 13 each, which cycles without drafts are found not to take."""
    governor, tree = Governor(costs(lambda n: 13.0), costs(flat), 1.0, hits=HITS), DraftTree(0, 8)
    assert governor.is_on
    without = []
    for number in range(40):
        cycle = governor.begin()
        cycle.drafted, cycle.levels, cycle.nodes = cycle.on, [2.0] * cycle.on, 4 if cycle.on else 1
        cycle.tokens, cycle.verify = 1, flat(cycle.nodes)
        governor.end(cycle, [tree], [[0]])
        without += [] if cycle.on else [number]
        if not governor.is_on:
            break
    assert without[0] == 4
    assert not governor.is_on
    steady = Machine(flat, 1.0, 0.8)
    found = steady.governor()
    steady.run(found, 1000)
    assert 5 <= steady.drafted.count(False) <= 16


def test_cycles_of_fewer_rows_teach_no_times() -> None:
    governor, tree = Governor(costs(flat), costs(flat), 1.0, rows=2, hits=HITS), DraftTree(0, 8)
    before = governor.to_dict()
    for _ in range(20):
        cycle = governor.begin()
        cycle.is_whole, cycle.verify, cycle.nodes = False, 500.0, 4
        governor.end(cycle, [tree], [[0]])
    after = governor.to_dict()
    assert after["pass_ms"] == before["pass_ms"]
    assert after["rate_drafting"] == before["rate_drafting"]


@pytest.mark.parametrize("right", [0.05, 0.9])
def test_cycles_that_would_begin_alike_do(right: float) -> None:
    machine = Machine(flat, level=1.0, right=right)
    governor, runs = machine.governor(), []
    for _ in range(300):
        most = governor.alike(16)
        begun = [governor.begin().on for _ in range(most)]
        assert len(set(begun)) == 1
        runs.append(most)
        machine.cycle(governor)
    assert min(runs) == 1
    assert max(runs) == 16
