"""What passes and draft levels take on this machine, measured at first use and kept up to date."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

__all__ = ["PassCosts", "Tally"]


class Tally:
    """A running mean that begins at a guess and forgets slowly."""

    __slots__ = ("_keep", "_sum", "_weight")

    def __init__(self, guess: float, weight: float, keep: float = 0.98) -> None:
        """Begin at a guess.

        Args:
            guess: The mean before anything was seen.
            weight: How many observations the guess counts for.
            keep: Share of all weight that is kept at each observation.
        """
        self._sum = guess * weight
        self._weight = weight
        self._keep = keep

    @property
    def value(self) -> float:
        """The mean."""
        return self._sum / self._weight

    def add(self, total: float, count: float = 1.0) -> None:
        """Take in observations.

        Args:
            total: Their sum.
            count: Their number; nothing happens at 0.
        """
        if count > 0:
            self._sum = self._sum * self._keep + total
            self._weight = self._weight * self._keep + count

    def scale(self, factor: float) -> None:
        """Multiply the mean."""
        self._sum *= factor


class PassCosts:
    """Time of a pass by its number of nodes, linear between the numbers that were seen."""

    def __init__(self, seconds: dict[int, float], *, weight: float = 4.0) -> None:
        """Begin with measurements.

        Args:
            seconds: Time of a pass for some numbers of nodes; at least one.
            weight: How many passes each of them counts for, above 0.
        """
        self._seen = {nodes: Tally(value, weight, 0.9) for nodes, value in seconds.items()}
        self._sizes = sorted(self._seen)

    def of(self, nodes: float) -> float:
        """Seconds that a pass over `nodes` takes."""
        sizes = self._sizes
        at = bisect_left(sizes, nodes)
        if at < len(sizes) and sizes[at] == nodes:
            return self._seen[sizes[at]].value
        if len(sizes) == 1:
            return self._seen[sizes[0]].value
        at = min(max(at, 1), len(sizes) - 1)
        low, high = sizes[at - 1], sizes[at]
        begin, end = self._seen[low].value, self._seen[high].value
        slope = max(end - begin, 0.0) / (high - low)
        return max(begin + slope * (nodes - low), 0.0)

    def of_all(self, sizes: Iterable[int]) -> list[float]:
        """Seconds that passes over some numbers of nodes take."""
        return [self.of(nodes) for nodes in sizes]

    def add(self, nodes: int, seconds: float) -> None:
        """Take in what a pass took; other sizes follow slowly, since a longer text slows all."""
        if nodes not in self._seen:
            self._seen[nodes] = Tally(self.of(nodes), 1.0, 0.9)
            self._sizes = sorted(self._seen)
        own = self._seen[nodes]
        # A pass that something else held up says little of what passes take.
        before = max(own.value, 1e-9)
        own.add(min(max(seconds, before / 3), 3 * before))
        moved = (own.value / before) ** 0.5
        for size, tally in self._seen.items():
            if size != nodes:
                tally.scale(moved)

    def to_dict(self) -> dict[int, float]:
        """Seconds by number of nodes."""
        return {nodes: self._seen[nodes].value for nodes in self._sizes}
