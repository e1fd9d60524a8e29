"""Least recently used features, within a bound on their bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

__all__ = ["FeatureCache"]


class FeatureCache:
    """Keeps what is dear to make and used again: the features of documents in calibration.

    What does not fit pushes out what was used longest ago; what is larger than the bound is made
    anew each time.

    Attributes:
        hits: Features that were there.
        misses: Features that had to be made.
    """

    def __init__(self, max_bytes: int) -> None:
        """Begin empty.

        Args:
            max_bytes: Bytes of tensors to hold at most; 0 keeps nothing.

        Raises:
            ValueError: If the bound is negative.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, found {max_bytes}")
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._held: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Features held."""
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes

    def clear(self) -> None:
        """Let go of everything; what was held is out of date."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Features by their key; they are shared, so nobody may write into them.

        Args:
            key: Names them.
            make: Makes them when they are not there.

        Returns:
            The features.
        """
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
        found = make()
        size = sum(tensor.nbytes for tensor in found)
        with self._lock:
            if size <= self.max_bytes and key not in self._held:
                self._held[key] = found
                self._bytes += size
                while self._bytes > self.max_bytes:
                    _, old = self._held.popitem(last=False)
                    self._bytes -= sum(tensor.nbytes for tensor in old)
        return found
