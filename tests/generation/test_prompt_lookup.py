"""Continuations found in the text itself."""

from __future__ import annotations

import numpy as np

from sedac_hf.generation.prompt_lookup import find_continuation


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
