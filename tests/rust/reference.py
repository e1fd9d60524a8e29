"""What the Rust core is held against: the definitions, written plainly in NumPy and SciPy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float32]


def confidence(risk: Floats, tau: np.float32) -> Floats:
    """`clamp((tau - risk) / tau, 0, 1)`; 0 without a finite risk or a threshold."""
    if tau == 0:
        return np.zeros_like(risk)
    with np.errstate(all="ignore"):
        scaled = np.clip((tau - risk) / tau, np.float32(0), np.float32(1))
    return np.where(np.isfinite(risk), scaled, np.float32(0))


def accumulate(previous: Floats, risk: Floats, tau: float, weight: float, gamma: float) -> Floats:
    """One step of the accumulator, in float32."""
    tau32, weight32, gamma32 = np.float32(tau), np.float32(weight), np.float32(gamma)
    return gamma32 * previous + weight32 * confidence(risk, tau32)


def probe_risk(
    hidden: npt.NDArray[np.float64],
    project: Floats,
    norm_weight: Floats,
    norm_bias: Floats,
    eps: float,
    out_weight: Floats,
    out_bias: float,
) -> npt.NDArray[np.float64]:
    """The probe in float64."""
    projected = hidden @ project.astype(np.float64).T
    centred = projected - projected.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    out = (normed * norm_weight + norm_bias) @ out_weight.astype(np.float64) + out_bias
    return np.logaddexp(0.0, out)


class Cascade:
    """The rule, row by row."""

    def __init__(self, tau: Floats, weight: Floats, gamma: Floats, exit_confidence: Floats) -> None:
        self.rules = list(zip(tau, weight, gamma, exit_confidence, strict=True))
        self.most: list[np.float32] = []
        most = np.float32(0)
        for _, w, g, _ in self.rules:
            most = g * most + w
            self.most.append(most)

    def step(
        self, k: int, risk: np.float32, before: np.float32
    ) -> tuple[np.float32, np.float32, bool]:
        """Accumulated confidence, normalised confidence, and whether the row tries to exit."""
        tau, weight, gamma, bar = self.rules[k]
        after = accumulate(np.array([before]), np.array([risk]), tau, weight, gamma)[0]
        share = after / self.most[k] if self.most[k] > 0 else np.float32(0)
        return after, share, bool(np.isfinite(risk) and np.isfinite(share) and share >= bar)


def replay(
    risk: Floats,
    probability: Floats,
    delta_nll: Floats,
    eligible: npt.NDArray[np.bool_],
    doc_offsets: npt.NDArray[np.int64],
    cascade: Cascade,
    min_probability: Floats,
) -> tuple[list[float], list[int], list[int]]:
    """One policy, token by token: mean delta per document, exits and tries per checkpoint."""
    checkpoints = risk.shape[1]
    exits, tries, means = [0] * checkpoints, [0] * checkpoints, []
    for start, stop in pairwise(doc_offsets):
        total = 0.0
        for token in range(start, stop):
            before = np.float32(0)
            for k in range(checkpoints if eligible[token] else 0):
                before, _, trying = cascade.step(k, risk[token, k], before)
                tries[k] += trying
                least = min_probability[k]
                if trying and (least == 0 or probability[token, k] >= least):
                    exits[k] += 1
                    total += float(delta_nll[token, k])
                    break
        means.append(total / (stop - start))
    return means, exits, tries


def betting_p_value(x: npt.NDArray[np.float64], alpha: float, delta: float) -> float:
    """The betting p-value, with the running mean and variance recomputed at every step."""
    n = len(x)
    wealth = greatest = 1.0
    for i in range(1, n + 1):
        means = [(0.5 + x[:j].sum()) / (j + 1) for j in range(1, i)]
        squares = sum((x[j] - means[j]) ** 2 for j in range(i - 1))
        variance = (0.25 + squares) / i
        bet = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 1.0)
        wealth *= 1 - bet * (x[i - 1] - alpha)
        greatest = max(greatest, wealth)
    return 1.0 / greatest


def hoeffding_bentkus_p_value(n: int, mean: float, alpha: float) -> float:
    """The Hoeffding-Bentkus p-value by SciPy's binomial."""
    low = min(mean, alpha)
    entropy = 0.0
    if low > 0:
        entropy += low * math.log(low / alpha)
    if low < 1:
        entropy += (1 - low) * math.log((1 - low) / (1 - alpha))
    bentkus = math.e * float(stats.binom.cdf(math.ceil(n * mean), n, alpha))
    return min(1.0, math.exp(-n * entropy), bentkus)


def histogram(values: Floats, edges: Floats) -> npt.NDArray[np.int64]:
    """Values between edges; one more bin for those that are not finite."""
    finite = values[np.isfinite(values)]
    bounds = np.concatenate([[-np.inf], edges.astype(np.float64), [np.inf]])
    counts = [int(((finite >= low) & (finite < high)).sum()) for low, high in pairwise(bounds)]
    return np.array([*counts, len(values) - len(finite)], np.int64)


def kl_divergence(
    live: npt.NDArray[np.float64], reference: npt.NDArray[np.float64], prior: float
) -> float:
    """`sum p ln(p / q)` after `prior` was added to every bin."""
    p, q = live + prior, reference + prior
    return float(stats.entropy(p / p.sum(), q / q.sum()))
