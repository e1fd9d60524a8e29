"""The whole selection, repeated: search on some documents, certify on others, look at the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sedac_hf import _core
from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.certify import walk
from sedac_hf.calibration.policy_search import search
from tests.calibration.synthetic import cost_model, drawn, population

REPEATS = 240
TARGET = RiskTarget(epsilon=0.01, delta=0.1, clip=0.15, tail_share=0.05)
# A procedure that fails with probability delta fails more often than this once in a thousand.
MOST_FAILURES = int(stats.binom.ppf(0.999, REPEATS, TARGET.delta))


def deltas(traces, policy):
    layers = policy.cascade.layers

    def column(name):
        return np.array([[getattr(layer, name) for layer in layers]], dtype=np.float32)

    out = _core.replay(
        traces.risk,
        traces.probability,
        traces.delta_nll,
        traces.eligible,
        traces.doc_offsets,
        column("threshold"),
        column("weight"),
        column("decay"),
        column("exit_confidence"),
        column("min_probability"),
    )
    return out["doc_delta"][0].astype(np.float64)


def breaks_the_claim(truth):
    """Whether a policy is unsafe, given its losses on the entire population."""
    return (
        np.clip(truth, -TARGET.clip, TARGET.clip).mean() > TARGET.limit
        or np.mean(truth > TARGET.clip) > TARGET.tail_share
    )


@pytest.fixture(scope="module")
def outcomes():
    """For every way of choosing: how often it broke the claim, and how often it chose anything."""
    whole, costs, rng = population(), cost_model(), np.random.default_rng(11)
    size = len(whole.doc_offsets) - 1
    broken = {"certified": 0, "one step past": 0, "in sample": 0}
    chose = dict.fromkeys(broken, 0)
    for repeat in range(REPEATS):
        seen = drawn(whole, rng.integers(size, size=60))
        fresh = drawn(whole, rng.integers(size, size=500))
        policies = search(
            seen, costs, epsilon=TARGET.epsilon, candidates=150, rungs=10, margin=2.0, seed=repeat
        )
        losses = [deltas(fresh, policy) for policy in policies]
        accepted = walk(losses.__getitem__, len(policies), TARGET).accepted
        # The policies are ordered by what the search documents said, so the last one within the
        # limit there is what a choice without fresh documents would take.
        within = [i for i, p in enumerate(policies) if p.estimated_delta <= TARGET.limit]
        picks = {
            "certified": accepted - 1 if accepted else None,
            "one step past": min(accepted, len(policies) - 1) if policies else None,
            "in sample": within[-1] if within else None,
        }
        for name, pick in picks.items():
            if pick is not None:
                chose[name] += 1
                broken[name] += breaks_the_claim(deltas(whole, policies[pick]))
    return broken, chose


@pytest.mark.slow
def test_the_certified_choice_breaks_its_claim_in_at_most_a_delta_share(outcomes):
    broken, chose = outcomes
    assert broken["certified"] <= MOST_FAILURES
    # A procedure that never exits would be safe and useless.
    assert chose["certified"] >= 0.8 * REPEATS


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["one step past", "in sample"])
def test_wrong_procedures_do_break_it(outcomes, wrong):
    """Shows that the test above can fail: it would, with either of two common mistakes."""
    broken, _ = outcomes
    assert broken[wrong] > MOST_FAILURES
