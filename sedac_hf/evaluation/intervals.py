"""How sure a figure is: bootstrap intervals and standard errors over documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["bootstrap_median", "bootstrap_ratio", "ratio_standard_error"]

FloatArray = npt.NDArray[np.float64]

# Resamples drawn at a time: bounds the index array to this times the number of documents.
_CHUNK = 64


def bootstrap_ratio(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of `sum(numerator) / sum(denominator)` over resampled units.

    Numerator and denominator of a unit stay together, so that a paired difference stays paired.
    With a denominator of ones it is the interval of a mean.

    Args:
        numerator: One value for each unit, shape `[D]`, D at least 1.
        denominator: Positive values, shape `[D]`.
        resamples: Number of resamples.
        level: Share of the resamples inside the interval.
        seed: Seed of the draw.

    Returns:
        Lower and upper end.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for at in range(0, resamples, _CHUNK):
        draw = rng.integers(len(top), size=(min(_CHUNK, resamples - at), len(top)))
        ratios[at : at + len(draw)] = top[draw].sum(axis=1) / bottom[draw].sum(axis=1)
    return _ends(ratios, level)


def bootstrap_median(
    values: npt.ArrayLike, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the median.

    Args:
        values: Shape `[N]`, N at least 1.
        resamples: Number of resamples.
        level: Share of the resamples inside the interval.
        seed: Seed of the draw.

    Returns:
        Lower and upper end.
    """
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    medians = np.empty(resamples)
    for at in range(0, resamples, _CHUNK):
        draw = rng.integers(len(sample), size=(min(_CHUNK, resamples - at), len(sample)))
        medians[at : at + len(draw)] = np.median(sample[draw], axis=1)
    return _ends(medians, level)


def ratio_standard_error(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> float:
    """Standard error of `R = sum(numerator) / sum(denominator)` over exchangeable units.

    The usual linearisation: `sqrt(D / (D - 1) * sum((y_i - R x_i)^2)) / sum(x_i)`.

    Args:
        numerator: One value y for each unit, shape `[D]`, D at least 2.
        denominator: Values x >= 0, shape `[D]`, not all 0.

    Returns:
        The standard error; NaN or infinite where a value is.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    units, total = len(top), bottom.sum()
    with np.errstate(invalid="ignore"):
        rest = top - top.sum() / total * bottom
    return float(np.sqrt(units / (units - 1) * np.square(rest).sum()) / total)


def _ends(values: FloatArray, level: float) -> tuple[float, float]:
    tail = (1.0 - level) / 2.0
    # An infinite value must show as an infinite end; interpolating next to it would give a NaN.
    low = np.quantile(values, tail, method="lower")
    high = np.quantile(values, 1.0 - tail, method="higher")
    return float(low), float(high)
