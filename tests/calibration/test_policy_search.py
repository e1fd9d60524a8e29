from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sedac_hf import _core
from sedac_hf.calibration.candidates import perturbed, random_policies, structured
from sedac_hf.calibration.policy_search import (
    Policy,
    ladder,
    most_cost,
    pareto_front,
    reorder,
    search,
)
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.errors import CalibrationError
from tests.calibration import oracle
from tests.calibration.synthetic import cost_model, drawn, population

NAMES = ("threshold", "weight", "decay", "exit_confidence", "min_probability")


@pytest.fixture(scope="module")
def traces():
    return population(80, seed=3)


def columns(policy):
    return [
        np.array([[getattr(layer, name) for layer in policy.cascade.layers]], np.float32)
        for name in NAMES
    ]


def replayed(traces, policy, replay):
    return replay(
        traces.risk,
        traces.probability,
        traces.delta_nll,
        traces.eligible,
        traces.doc_offsets,
        *columns(policy),
    )


def test_estimates_are_those_of_a_slow_replay_of_the_stored_thresholds(traces):
    front = pareto_front(traces, cost_model(), candidates=120)
    assert len(front) > 5
    for policy in front[:: len(front) // 4]:
        out = replayed(traces, policy, oracle.replay)
        tokens = int(traces.eligible.sum())
        assert policy.estimated_delta == pytest.approx(out["doc_delta"].mean(), abs=1e-6)
        assert policy.exit_share == pytest.approx(out["exits"].sum() / tokens)
        cost = cost_model().expected(out["exits"], out["tries"], columns(policy)[4] > 0, tokens)
        assert policy.cost == pytest.approx(cost[0], abs=1e-9)


def test_nothing_on_the_front_is_beaten_and_it_is_in_order(traces):
    front = pareto_front(traces, cost_model(), candidates=300)
    assert all(a.estimated_delta < b.estimated_delta for a, b in pairwise(front))
    assert all(a.cost > b.cost for a, b in pairwise(front))
    assert all(policy.cost < 1.0 for policy in front)


def test_more_candidates_never_make_the_front_worse(traces):
    few = pareto_front(traces, cost_model(), candidates=3, seed=1)
    many = pareto_front(traces, cost_model(), candidates=1500, seed=1)
    limit = math.log1p(0.01)

    def best(front):
        return min((p.cost for p in front if p.estimated_delta <= limit), default=1.0)

    # The grid is in both; refinement must add something on top of it.
    assert best(many) < best(few)


def test_same_seed_same_policies(traces):
    assert search(traces, cost_model(), seed=5, candidates=200) == search(
        traces, cost_model(), seed=5, candidates=200
    )


def test_thresholds_survive_float32(traces):
    for policy in search(traces, cost_model(), candidates=200):
        for layer in policy.cascade.layers:
            for name in NAMES:
                value = getattr(layer, name)
                assert float(np.float32(value)) == value


def test_walk_has_steps_on_both_sides_of_the_target():
    traces = population(200, seed=4)
    walk = search(traces, cost_model(), candidates=1500, rungs=10, margin=1.5)
    limit = math.log1p(0.01)
    assert any(p.estimated_delta < 0.5 * limit for p in walk)
    assert any(0.5 * limit < p.estimated_delta <= limit for p in walk)
    assert any(limit < p.estimated_delta <= 1.5 * limit for p in walk)
    assert all(p.estimated_delta <= 1.5 * limit for p in walk)
    assert [p.cost for p in walk] == sorted((p.cost for p in walk), reverse=True)


def test_nothing_is_returned_when_nothing_saves(traces):
    costs = cost_model()
    dear = replace(
        costs, checkpoints=tuple(replace(c, attempt=5.0, saved=0.01) for c in costs.checkpoints)
    )
    assert search(traces, dear, candidates=200) == []


def test_nan_risk_and_nan_probability_never_exit(traces):
    spoilt = drawn(traces, np.arange(80))
    spoilt.risk[:, 0] = np.nan
    spoilt.probability[:, 1] = np.nan
    walk = search(spoilt, cost_model(), candidates=300, margin=50.0)
    assert walk
    for policy in walk:
        exits = replayed(spoilt, policy, _core.replay)["exits"][0]
        assert exits[0] == 0
        if policy.cascade.layers[1].min_probability > 0:
            assert exits[1] == 0


def test_a_policy_that_meets_a_nan_loss_is_dropped(traces):
    spoilt = drawn(traces, np.arange(80))
    # An exit at the first checkpoint on any of these tokens would be of unknown harm.
    spoilt.delta_nll[:, 0] = np.nan
    for policy in search(spoilt, cost_model(), candidates=300, margin=50.0):
        assert replayed(spoilt, policy, _core.replay)["exits"][0, 0] == 0


def test_documents_without_a_token_that_may_exit_do_not_dilute(traces):
    idle = drawn(traces, np.concatenate([np.arange(80), np.arange(80)]))
    idle.eligible.reshape(160, -1)[80:] = False
    front, diluted = (pareto_front(t, cost_model(), candidates=150) for t in (traces, idle))
    assert [p.estimated_delta for p in front] == pytest.approx([p.estimated_delta for p in diluted])


def test_documents_that_the_base_cannot_score_are_left_out(traces):
    spoilt = drawn(traces, np.arange(80))
    spoilt.nll_full[3] = np.inf
    spoilt.delta_nll[:16] = np.nan
    assert pareto_front(spoilt, cost_model(), candidates=100)


def test_traces_without_any_usable_document_are_refused(traces):
    spoilt = drawn(traces, np.arange(80))
    spoilt.eligible[:] = False
    with pytest.raises(CalibrationError, match="none of 80 traced documents"):
        search(spoilt, cost_model())


def test_costs_of_other_checkpoints_are_refused(traces):
    costs = cost_model()
    other = replace(costs, checkpoints=(replace(costs.checkpoints[0], layer_idx=1),))
    with pytest.raises(CalibrationError, match="checkpoints"):
        search(traces, other)


def test_ladder_spaces_by_the_inflated_delta():
    front = [policy(delta, 1.0 - 10 * delta) for delta in np.linspace(0.0005, 0.03, 60)]
    plain = ladder(front, epsilon=0.01, rungs=5, margin=1.0)
    inflated = ladder(front, epsilon=0.01, rungs=5, margin=1.0, inflation=2.0)
    limit = math.log1p(0.01)
    assert len(plain) == len(inflated) == 5
    assert inflated[-1].estimated_delta <= limit
    # The same true delta now belongs to a policy of half the replayed one.
    assert inflated[-1].cost == pytest.approx(1.0 - 10 * limit / 2, abs=0.006)
    assert plain[-1].cost == pytest.approx(1.0 - 10 * limit, abs=0.006)


@pytest.mark.parametrize("bad", [{"rungs": 0}, {"margin": 0.0}, {"epsilon": -1.0}])
def test_ladder_refuses_nonsense(bad):
    with pytest.raises(CalibrationError, match="must be positive"):
        ladder([policy(0.1, 0.5)], **bad)


def test_reorder_trusts_the_verified_deltas():
    walk = [policy(0.001, 0.9), policy(0.002, 0.8), policy(0.003, 0.7), policy(0.004, 0.6)]
    verified = np.array(
        [
            [0.01, 0.03, np.nan],  # beaten by the next: dearer and worse
            [0.01, 0.01, np.nan],
            [0.01, np.inf, np.nan],  # an infinite loss
            [0.02, 0.04, np.nan],
        ]
    )
    ordered = reorder(walk, verified)
    assert [p.cost for p in ordered] == [0.8, 0.6]
    assert [p.estimated_delta for p in ordered] == pytest.approx([0.01, 0.03])


def test_policy_round_trip():
    original = policy(0.004, 0.8)
    assert Policy.from_dict(original.to_dict()) == original


def test_structured_candidates_open_one_checkpoint_or_all(traces):
    grid = structured(traces)
    out = _core.replay(
        traces.risk,
        traces.probability,
        traces.delta_nll,
        traces.eligible,
        traces.doc_offsets,
        grid.tau,
        grid.weight,
        grid.gamma,
        grid.exit_confidence,
        grid.min_probability,
    )
    used = out["exits"] > 0
    third = len(grid) // 3
    assert not used[:third, 1].any()
    assert not used[third : 2 * third, 0].any()
    assert used[2 * third :].all(axis=1).any()


def test_a_closed_checkpoint_never_tries_even_after_full_confidence(traces):
    # Every token is certain at the first checkpoint but held back there by its probability.
    calm = drawn(traces, np.arange(80))
    calm.risk[:] = 0.0
    calm.probability[:] = 0.0
    grid = structured(traces)
    third = len(grid) // 3
    some = grid.selected(np.arange(third))
    out = _core.replay(
        calm.risk,
        calm.probability,
        calm.delta_nll,
        calm.eligible,
        calm.doc_offsets,
        some.tau,
        some.weight,
        np.full_like(some.gamma, 0.9),
        some.exit_confidence,
        np.full_like(some.min_probability, 0.5),
    )
    assert out["tries"][:, 0].all()
    assert not out["tries"][:, 1].any()


def test_drawn_candidates_are_in_range(traces):
    rng = np.random.default_rng(0)
    drawn_policies = random_policies(traces, 500, rng)
    for vectors in (drawn_policies, perturbed(drawn_policies, 500, rng)):
        for array in (vectors.tau, vectors.weight, vectors.gamma, vectors.min_probability):
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
        assert (vectors.tau >= 0).all()
        assert (vectors.weight > 0).all()
        assert ((vectors.gamma >= 0) & (vectors.gamma < 1)).all()
        assert ((vectors.min_probability >= 0) & (vectors.min_probability <= 1)).all()
        assert (vectors.exit_confidence > 0).all()


def policy(delta, cost):
    layers = tuple(
        LayerConfig(layer_idx=layer, threshold=0.5 + delta, min_probability=0.5) for layer in (3, 6)
    )
    return Policy(CascadeConfig(layers), float(delta), 0.2, float(cost))


def test_dear_heads_leave_policies_in_the_walk(traces):
    """Heads that take 4 % of a pass to follow a text are paid for by exits and no exits alike."""
    cheap = cost_model()
    columns = [replace(c, fill=c.fill + 0.04, saved=0.02) for c in cheap.checkpoints]
    dear = replace(cheap, checkpoints=tuple(columns))
    assert most_cost(dear) == pytest.approx(most_cost(cheap) + 0.04 * len(columns))
    assert pareto_front(traces, dear, candidates=200, most_cost=most_cost(dear))
    assert not pareto_front(traces, dear, candidates=200, most_cost=1.02)
