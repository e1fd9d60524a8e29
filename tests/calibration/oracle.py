"""Slow and plain versions of the replay and the tests, to compare the Rust ones with."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def replay(
    risk,
    probability,
    delta_nll,
    eligible,
    doc_offsets,
    tau,
    weight,
    gamma,
    exit_confidence,
    min_probability,
):
    """One token after the other, one policy after the other, in float32 like the decode step."""
    policies, checkpoints = tau.shape
    documents = len(doc_offsets) - 1
    exits = np.zeros((policies, checkpoints), np.int64)
    tries = np.zeros((policies, checkpoints), np.int64)
    doc_delta = np.zeros((policies, documents), np.float32)
    f = np.float32
    for p in range(policies):
        for d in range(documents):
            first, end = int(doc_offsets[d]), int(doc_offsets[d + 1])
            total = 0.0
            for t in range(first, end):
                if not eligible[t]:
                    continue
                have, most = f(0), f(0)
                for k in range(checkpoints):
                    r, level = risk[t, k], tau[p, k]
                    usable = np.isfinite(r)
                    conf = f(0)
                    if usable and level > 0:
                        conf = np.clip(f((level - r) / level), f(0), f(1))
                    have = f(gamma[p, k] * have + weight[p, k] * conf)
                    most = f(gamma[p, k] * most + weight[p, k])
                    ratio = f(have / most) if most > 0 else f(0)
                    if not (usable and ratio >= exit_confidence[p, k]):
                        continue
                    tries[p, k] += 1
                    least = min_probability[p, k]
                    if least > 0 and not probability[t, k] >= least:
                        continue
                    exits[p, k] += 1
                    total += float(delta_nll[t, k])
                    break
            doc_delta[p, d] = total / (end - first) if end > first else 0.0
    return {
        "doc_delta": doc_delta,
        "exits": exits,
        "tries": tries,
        "tokens": int(np.count_nonzero(eligible)),
    }


def betting_p_value(x, alpha, delta):
    """Waudby-Smith and Ramdas: wealth of a gambler who bets that the mean is below alpha."""
    n = len(x)
    wealth, best = 1.0, 1.0
    seen_sum, seen_square, variance = 0.5, 0.25, 0.25
    for i, value in enumerate(x, start=1):
        nu = min(math.sqrt(2.0 * math.log(1.0 / delta) / (n * variance)), 1.0)
        wealth *= 1.0 - nu * (value - alpha)
        best = max(best, wealth)
        seen_sum += value
        mean = seen_sum / (i + 1)
        seen_square += (value - mean) ** 2
        variance = seen_square / (i + 1)
    return 1.0 / best


def hoeffding_bentkus_p_value(n, mean, alpha):
    """The smaller of the Hoeffding and the Bentkus bound."""

    def term(a, b):
        return 0.0 if a == 0 else a * math.log(a / b)

    low = min(mean, alpha)
    divergence = term(low, alpha) + term(1.0 - low, 1.0 - alpha)
    bentkus = math.e * float(stats.binom.cdf(math.ceil(n * mean), n, alpha))
    return min(1.0, math.exp(-n * divergence), bentkus)


def fixed_sequence(p_values, delta):
    """How many hypotheses are rejected before the first that is not."""
    count = 0
    for p in p_values:
        if not p <= delta:
            break
        count += 1
    return count
