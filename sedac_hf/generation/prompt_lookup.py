"""Drafts found in the text itself: what followed when its last words occurred before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["LookupHit", "find_continuation"]

IntArray = npt.NDArray[np.int64]


class LookupHit(NamedTuple):
    """A continuation found in the text.

    Attributes:
        tokens: What followed.
        matched: How many of the last tokens had occurred before it.
    """

    tokens: IntArray
    matched: int


def find_continuation(
    text: IntArray, most: int, longest: int = 4, shortest: int = 2
) -> LookupHit | None:
    """What followed the latest earlier occurrence of the text's last tokens.

    Args:
        text: Tokens so far, `[length]`.
        most: Tokens to return at most.
        longest: Longest run of last tokens to look for; the longest match wins.
        shortest: Shortest run that counts.

    Returns:
        The hit, or None.
    """
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
    return LookupHit(text[end + 1 : end + 1 + most], matched)
