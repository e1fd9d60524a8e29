"""The tests behind the certificate: is the mean rise of the NLL below the target?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from sedac_hf import _core
from sedac_hf.errors import CalibrationError

__all__ = ["RiskTarget", "TestResult", "binomial_upper_bound", "documents_needed"]

FloatArray = npt.NDArray[np.float64]

_MOST_DOCUMENTS = 1 << 18


@dataclass(frozen=True)
class RiskTarget:
    """What is to be shown, fixed before any certification document is looked at.

    Two things are claimed of a policy together, at one confidence: the mean over documents of the
    rise of the NLL per token, each clipped to `[-clip, clip]`, is at most `log(1 + epsilon)`; and
    at most a share `tail_share` of documents rises by more than `clip`.

    Attributes:
        epsilon: Perplexity increase allowed, as a fraction.
        delta: Allowed probability that the claim is false.
        clip: Bound on the rise of one document, in nats per token.
        tail_share: Allowed share of documents beyond `clip`.
    """

    epsilon: float = 0.01
    delta: float = 0.1
    clip: float = 0.1
    tail_share: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            CalibrationError: If a value is out of range, or the target is not below the clip.
        """
        for name in ("delta", "tail_share"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise CalibrationError(f"{name} must lie in (0, 1), found {getattr(self, name)!r}.")
        if not 0.0 < self.epsilon < math.inf or not 0.0 < self.clip < math.inf:
            raise CalibrationError(
                f"epsilon and clip must be positive, found {self.epsilon!r} and {self.clip!r}."
            )
        if self.limit >= self.clip:
            raise CalibrationError(
                f"clip must exceed the target log(1 + epsilon) = {self.limit:.4g}, found "
                f"{self.clip:.4g}; a clipped mean below it would show nothing."
            )

    @property
    def limit(self) -> float:
        """Allowed mean rise in nats per token."""
        return math.log1p(self.epsilon)

    @property
    def level(self) -> float:
        """The limit on the unit scale of the test."""
        return (self.limit + self.clip) / (2.0 * self.clip)

    def unit(self, deltas: FloatArray) -> FloatArray:
        """Rises clipped and mapped to [0, 1].

        Args:
            deltas: Rise of each document, shape `[n]`; infinite counts as the clip, NaN is refused.

        Returns:
            Values in [0, 1], shape `[n]`.

        Raises:
            CalibrationError: If a value is NaN.
        """
        if np.isnan(deltas).any():
            raise CalibrationError(
                f"{int(np.isnan(deltas).sum())} of {len(deltas)} documents have a NaN rise; leave "
                "out documents that cannot be scored before the test, by their base NLL alone."
            )
        clipped = np.clip(deltas, -self.clip, self.clip)
        return np.asarray((clipped + self.clip) / (2.0 * self.clip), dtype=np.float64)

    def test(self, deltas: FloatArray) -> TestResult:
        """Test one policy.

        Args:
            deltas: Rise of each document under the policy, shape `[n]`, in an order that does not
                depend on the values.

        Returns:
            The p-values and what they were made of.

        Raises:
            CalibrationError: If there are no documents or a value is NaN.
        """
        count = len(deltas)
        if not count:
            raise CalibrationError("there are no documents to certify on; pass at least one.")
        unit = self.unit(np.asarray(deltas, dtype=np.float64))
        beyond = int(np.count_nonzero(deltas > self.clip))
        level = self.level
        mean = float(unit.mean())
        return TestResult(
            mean=float(np.mean(deltas)),
            clipped_mean=(2.0 * mean - 1.0) * self.clip,
            beyond_clip=beyond,
            p_betting=float(_core.betting_p_value(unit, level, self.delta)),
            p_hoeffding_bentkus=float(_core.hoeffding_bentkus_p_value(count, mean, level)),
            # P(at most this many beyond the clip) if the share were the allowed one.
            p_tail=float(stats.binom.cdf(beyond, count, self.tail_share)),
        )


@dataclass(frozen=True)
class TestResult:
    """Result of testing one policy.

    Attributes:
        mean: Mean rise, not clipped, nats per token.
        clipped_mean: Mean of the clipped rises.
        beyond_clip: Documents whose rise exceeds the clip.
        p_betting: p-value of "the clipped mean exceeds the limit", by betting.
        p_hoeffding_bentkus: The same by Hoeffding-Bentkus, for comparison.
        p_tail: p-value of "more than the allowed share of documents rises beyond the clip".
    """

    # Not a test class, whatever its name starts with.
    __test__ = False

    mean: float
    clipped_mean: float
    beyond_clip: int
    p_betting: float
    p_hoeffding_bentkus: float
    p_tail: float

    @property
    def p_value(self) -> float:
        """p-value of "one of the two claims is false": small only when both are."""
        return max(self.p_betting, self.p_tail)


def binomial_upper_bound(successes: int, trials: int, delta: float) -> float:
    """Clopper-Pearson upper bound of a share at confidence `1 - delta`.

    Args:
        successes: Number seen.
        trials: Number of trials.
        delta: Allowed probability of error.

    Returns:
        The bound, 1 when everything was a success.
    """
    if successes >= trials:
        return 1.0
    return float(stats.beta.ppf(1.0 - delta, successes + 1, trials - successes))


def documents_needed(
    deltas: FloatArray, target: RiskTarget, *, resamples: int = 21, seed: int = 0
) -> int | None:
    """How many documents like these would show the claim in half of all cases.

    Args:
        deltas: Rise of each document seen, shape `[n]`.
        target: What is to be shown.
        resamples: Bootstrap samples tried at each size.
        seed: Seed of the draw.

    Returns:
        About how many documents in all; None when the documents speak against the claim, or when
        more than a quarter of a million would be needed.
    """
    values = np.asarray(deltas, dtype=np.float64)
    clipped = np.clip(values, -target.clip, target.clip)
    if clipped.mean() >= target.limit or np.mean(values > target.clip) >= target.tail_share:
        return None
    rng = np.random.default_rng(seed)

    def enough(size: int) -> bool:
        draws = (values[rng.integers(len(values), size=size)] for _ in range(resamples))
        return 2 * sum(target.test(d).p_value <= target.delta for d in draws) > resamples

    high = 16
    while not enough(high):
        high *= 2
        if high > _MOST_DOCUMENTS:
            return None
    low = high // 2
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
