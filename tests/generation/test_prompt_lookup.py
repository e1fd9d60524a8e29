"""Continuations found in the text itself."""

from __future__ import annotations

import numpy as np
import pytest

from sedac_hf.generation.prompt_lookup import find_continuation
from tests.generation.plain_drafts import plain_continuation


def found(text: list[int], **values: int) -> tuple[list[int], int] | None:
    hit = find_continuation(np.array(text), **{"most": 3, **values})
    return None if hit is None else (hit.tokens.tolist(), hit.matched)


def test_the_longest_match_wins_over_a_later_one() -> None:
    assert found([1, 2, 3, 7, 2, 3, 8, 1, 2, 3]) == ([7, 2, 3], 3)


def test_of_equal_matches_the_latest_wins() -> None:
    assert found([2, 3, 7, 2, 3, 8, 9, 2, 3]) == ([8, 9, 2], 2)


def test_the_match_may_overlap_the_end() -> None:
    assert found([5, 5, 5, 5]) == ([5], 3)


def test_short_matches_do_not_count() -> None:
    assert found([3, 7, 1, 3]) is None
    assert found([4, 3, 7, 4, 3], shortest=3) is None


def test_no_more_than_asked_for() -> None:
    assert found([1, 2, 3, 4, 5, 1, 2], most=2) == ([3, 4], 2)
    assert found([1, 2, 3, 4, 5, 1, 2], most=0) is None
    assert found([1], most=2) is None


def test_no_longer_match_than_asked_for_is_looked_at() -> None:
    text = [1, 2, 3, 7, 2, 3, 8, 1, 2, 3]
    assert found(text, longest=2) == ([8, 1, 2], 2)


@pytest.mark.parametrize("words", [2, 3, 6])
def test_it_is_found_as_in_plain_words(words: int) -> None:
    random, hits = np.random.default_rng(words), 0
    for _ in range(200):
        text = random.integers(0, words, random.integers(0, 40))
        most, longest, shortest = (int(n) for n in random.integers((0, 1, 1), (6, 7, 5)))
        expected = plain_continuation(text, most, longest, shortest)
        hits += expected is not None
        assert found(text.tolist(), most=most, longest=longest, shortest=shortest) == expected
    assert hits > 30
