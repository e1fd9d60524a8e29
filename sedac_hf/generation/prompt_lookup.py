"""Drafts found in the text itself: what followed when its last words occurred before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sedac_hf import _core

__all__ = ["LookupHit", "find_continuation"]

IntArray = npt.NDArray[np.int64]

_SHORTEST, _LONGEST = _core.LOOKUP_SPAN


class LookupHit(NamedTuple):
    """A continuation found in the text.

    Attributes:
        tokens: What followed.
        matched: How many of the last tokens had occurred before it.
    """

    tokens: IntArray
    matched: int


def find_continuation(
    text: IntArray, most: int, longest: int = _LONGEST, shortest: int = _SHORTEST
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
    if most < 1:
        return None
    hit = _core.find_continuation(np.ascontiguousarray(text, np.int64), shortest, longest)
    if hit is None:
        return None
    start, matched = hit
    return LookupHit(text[start : start + most], matched)
