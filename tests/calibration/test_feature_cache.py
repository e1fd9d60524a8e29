"""Features in memory: the least recently used go first, and never too many bytes stay."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.calibration.feature_cache import FeatureCache
from tests.threads import in_threads

EACH = 400  # bytes of one feature


def feature(value: int) -> tuple[torch.Tensor, ...]:
    return torch.full((50,), value, dtype=torch.int32), torch.full((100,), value, dtype=torch.int16)


def fetch(cache: FeatureCache, key: int) -> int:
    return int(cache.get(key, lambda: feature(key))[0][0])


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(3 * EACH)
    assert [fetch(cache, key) for key in (0, 1, 2, 0)] == [0, 1, 2, 0]
    assert (cache.hits, cache.misses, len(cache), cache.nbytes) == (1, 3, 3, 3 * EACH)
    fetch(cache, 3)  # in place of 1
    assert [fetch(cache, key) for key in (0, 2, 3)] == [0, 2, 3]
    assert cache.misses == 4
    fetch(cache, 1)
    assert (cache.misses, cache.nbytes) == (5, 3 * EACH)


@pytest.mark.parametrize("bound", [0, EACH - 1])
def test_what_is_too_large_is_made_each_time(bound: int) -> None:
    cache = FeatureCache(bound)
    assert [fetch(cache, 7) for _ in range(3)] == [7, 7, 7]
    assert (cache.hits, cache.misses, len(cache), cache.nbytes) == (0, 3, 0, 0)


def test_what_is_cleared_is_made_anew() -> None:
    cache = FeatureCache(10 * EACH)
    fetch(cache, 1)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    assert int(cache.get(1, lambda: feature(9))[0][0]) == 9


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, found -1"):
        FeatureCache(-1)


def test_threads_never_hold_more_than_the_bound() -> None:
    cache, wrong = FeatureCache(5 * EACH), []

    def work(seed: int) -> None:
        for step in range(300):
            key = (step * (seed + 3)) % 17
            if fetch(cache, key) != key or cache.nbytes > 6 * EACH:
                wrong.append(key)

    in_threads(work, 6)
    assert not wrong
    assert cache.nbytes == 5 * EACH
    assert cache.hits + cache.misses == 6 * 300
