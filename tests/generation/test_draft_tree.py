"""Which candidates become nodes, in what order, and how paths are shared."""

from __future__ import annotations

import numpy as np
import pytest

from sedac_hf.generation.draft_tree import BLANK, HEAD, LOOKUP, ROOT, DraftTree, stack_trees
from tests.generation.plain_drafts import PlainTree


def test_the_most_probable_paths_are_taken_first() -> None:
    tree = DraftTree(9, limit=3)
    tree.offer(0, [1, 2, 3], [0.6, 0.3, 0.1])
    assert tree.take(2) == [1, 2]
    tree.offer(1, [4, 5], [0.5, 0.1])
    tree.offer(2, [6], [0.9])
    # 0.6 * 0.5 = 0.3, 0.3 * 0.9 = 0.27, 0.1, 0.6 * 0.1 = 0.06
    assert tree.take(9) == [3, 4, 5, 6]
    assert tree.tokens == [9, 1, 2, 4, 6, 3, 5]
    assert tree.parents == [-1, 0, 0, 1, 2, 0, 1]
    assert tree.scores == pytest.approx([1, 0.6, 0.3, 0.3, 0.27, 0.1, 0.06])
    assert tree.ranks == [0, 0, 1, 0, 0, 2, 1]
    assert tree.child(1, 4) == 3
    assert tree.child(2, 4) is None


def test_what_is_below_the_least_probability_stays_out() -> None:
    tree = DraftTree(9, limit=3)
    tree.offer(0, [1, 2], [0.6, 0.3])
    assert tree.next_scores(3) == [0.6, 0.3]
    assert tree.take(5, least=0.4) == [1]
    assert tree.next_scores(3) == [0.3]
    assert tree.take(5) == [2]
    assert tree.next_scores(3) == []


def test_no_node_lies_deeper_than_the_limit() -> None:
    tree = DraftTree(9, limit=2)
    tree.offer_path([1, 2, 3], [0.9, 0.8, 0.7], 2)
    assert len(tree.take(9)) == 2
    tree.offer(2, [4], [0.9])
    assert tree.take(9) == []
    none = DraftTree(9, limit=0)
    none.offer(0, [1], [0.9])
    none.offer_path([1], [0.9], 2)
    assert none.take(9) == []


def test_a_path_found_as_a_whole_shares_the_nodes_that_are_there() -> None:
    tree = DraftTree(9, limit=5)
    tree.offer(0, [1, 2], [0.6, 0.3])
    tree.offer_path([1, 7, 8], [0.5, 0.45, 0.4], 2)
    assert tree.take(9) == [1, 2, 3, 4]
    assert tree.tokens == [9, 1, 7, 8, 2]
    assert tree.parents == [-1, 0, 1, 2, 0]
    assert tree.origins == [ROOT, HEAD, LOOKUP, LOOKUP, HEAD]


def test_children_of_nodes_that_are_not_known_yet_wait() -> None:
    tree = DraftTree(9, limit=5)
    tree.offer_path([1, 2, 3], [0.9, 0.8, 0.7], 2)
    tree.offer(0, [4], [0.5])
    assert tree.take(9, known=1) == [1, 2]
    assert tree.tokens == [9, 1, 4]
    assert tree.take(9, known=3) == [3]
    assert tree.take(9) == [4]
    assert tree.tokens == [9, 1, 4, 2, 3]


def test_what_is_not_finite_is_no_candidate() -> None:
    tree = DraftTree(9, limit=5)
    tree.offer(0, [1, 2, 3], [float("nan"), 0.5, float("inf")])
    assert tree.take(9) == [1]
    assert tree.tokens == [9, 2]


def test_rows_are_padded_with_blanks_that_no_token_reaches() -> None:
    small, large = DraftTree(9, limit=5), DraftTree(8, limit=5)
    large.offer(0, [1, 2], [0.6, 0.3])
    large.take(9)
    large.offer(1, [3], [0.9])
    large.take(9)
    stacked = stack_trees([small, large])
    assert stacked.tokens.tolist() == [[9, 9, 9, 9], [8, 1, 2, 3]]
    assert stacked.depths.tolist() == [[0, 1, 1, 1], [0, 1, 1, 2]]
    assert small.origins == [ROOT, BLANK, BLANK, BLANK]
    assert small.child(0, 9) is None
    one, zero = True, False
    expected = [
        [one, zero, zero, zero],
        [one, one, zero, zero],
        [one, zero, one, zero],
        [one, one, zero, one],
    ]
    assert np.array_equal(stacked.seen[1], expected)


def test_nodes_that_are_given_up_can_no_longer_be_reached() -> None:
    tree = DraftTree(9, limit=5)
    tree.offer(0, [1, 2, 3], [0.6, 0.3, 0.1])
    tree.take(9)
    tree.cut(2)
    assert (len(tree), tree.tokens, tree.depths) == (2, [9, 1], [0, 1])
    assert (tree.child(0, 1), tree.child(0, 2)) == (1, None)
    assert tree.expanded == {0}


@pytest.mark.parametrize("seed", range(60))
def test_the_tree_of_the_core_is_the_one_in_plain_words(seed: int) -> None:
    """Whatever is put up, taken, given up and filled: every node is the same."""
    random = np.random.default_rng(seed)
    limit, chain = int(random.integers(0, 6)), seed % 4 == 3
    trees = DraftTree(9, limit, chain=chain), PlainTree(9, limit, chain=chain)
    found = random.integers(0, 6, 5).tolist(), np.sort(random.random(5))[::-1].tolist()
    if seed % 3:
        for tree in trees:
            tree.offer_path(*found, 3)
    for _ in range(10):
        act, count = random.integers(0, 5), int(random.integers(0, 4))
        known = len(trees[0]) if random.random() < 0.5 else None
        node = int(random.integers(0, len(trees[0])))
        tokens = random.permutation(6)[:4].tolist()
        chances = np.sort(random.random(4))[::-1].tolist()
        if random.random() < 0.1:
            chances[0] = float(random.choice([np.nan, np.inf, 0.0]))
        for tree in trees:
            if act < 2:
                tree.offer(node, tokens, chances)
            elif act < 4:
                taken = tree.take(count, least=0.05 * count, known=known)
                assert taken == list(range(len(tree) - len(taken), len(tree)))
            else:
                tree.pad(len(tree) + count % 2)
        own, plain = trees
        for name in ("tokens", "parents", "scores", "depths", "origins", "ranks", "expanded"):
            assert getattr(own, name) == getattr(plain, name), name
        assert own.matched == plain.matched
        assert own.next_scores(9) == plain.next_scores(9)
        assert own.all_scores(3) == plain.all_scores(3)
        for parent in range(len(own)):
            assert [own.child(parent, t) for t in range(6)] == [
                plain.child(parent, t) for t in range(6)
            ]
    size = len(trees[0]) // 2 + 1
    for tree in trees:
        tree.cut(size)
    assert trees[0].tokens == trees[1].tokens


def test_blanks_that_are_given_up_take_no_child_with_them() -> None:
    tree = DraftTree(7, limit=4)
    tree.offer(0, [7], [0.5])
    tree.take(1)
    tree.pad(3)
    tree.cut(2)
    assert tree.child(0, 7) == 1, "it has the token that blanks have"


def test_what_is_wrong_is_refused() -> None:
    tree = DraftTree(9, limit=4)
    with pytest.raises(ValueError, match="a node of the tree"):
        tree.offer(1, [1], [0.5])
    with pytest.raises(ValueError, match="one for each token"):
        tree.offer(0, [1, 2], [0.5])
    with pytest.raises(ValueError, match="one for each token"):
        tree.offer_path([1], [], 2)
    assert tree.take(-3) == []
