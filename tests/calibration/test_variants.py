"""Which parts of the gates pay, on invented traces of which it is known what helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sedac_hf import _core
from sedac_hf.calibration.candidates import PolicyVectors, random_policies
from sedac_hf.calibration.costs import CheckpointCost, CostModel
from sedac_hf.calibration.route_search import choose_routes, routed_traces
from sedac_hf.calibration.token_facts import TokenFacts
from sedac_hf.calibration.traces import Traces
from sedac_hf.calibration.variants import Material, Variant, front_of, search_variants
from sedac_hf.core.cascade_config import CascadeConfig
from sedac_hf.core.cascade_controller import CascadeController
from sedac_hf.core.cascade_options import ClassRule
from sedac_hf.core.cascade_state import StepContext
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.token_routing import TOKEN_CLASSES, classes_of

TABLE = (np.arange(50) % 5).astype(np.uint8)
LIMIT = np.log1p(0.01)


def material(documents=240, length=20, *, by_class=False, better=0.0, seed=0):
    """Traces of one checkpoint; with `by_class` the same risk means less harm in some classes."""
    rng = np.random.default_rng(seed)
    count = documents * length
    tokens = rng.integers(0, 50, count)
    hard = rng.random(count) < 0.5
    shift = np.where(TABLE[tokens] < 2, 1.0, -1.0) * (1.0 if by_class else 0.0)
    signal = hard * 2.0 + rng.normal(0, 1.0, count) + shift
    risk = np.logaddexp(0, signal)[:, None].astype(np.float32)
    sharper = np.logaddexp(0, signal * (1 - better) + better * (hard * 8.0 - 2))[:, None]
    harm = np.where(hard, rng.exponential(0.5, count), rng.normal(0, 0.01, count))
    eligible = np.ones((documents, length), bool)
    eligible[:, 0] = False
    traces = Traces(
        checkpoints=(3,),
        doc_offsets=np.arange(0, count + 1, length, dtype=np.int64),
        eligible=eligible.reshape(-1),
        nll_full=np.full(count, 2.0, np.float32),
        risk=risk,
        probability=rng.random((count, 1)).astype(np.float32),
        delta_nll=harm[:, None].astype(np.float32),
        divergence=np.abs(harm)[:, None].astype(np.float32),
        agree=~hard[:, None],
    )
    facts = TokenFacts(
        tokens,
        rng.gamma(1.0, 1.0, count).astype(np.float32),
        np.zeros((count, 1), np.float32),
        np.full((count, 1), np.nan, np.float32),
    )
    costs = CostModel((CheckpointCost(3, 0.002, 0.002, 0.05, 0.03, 0.6),), head=0.1, depth=10)
    kinds = {"none": traces}
    if better > 0:
        kinds["static"] = replace(traces, risk=sharper.astype(np.float32))
    return Material(kinds, facts, dict.fromkeys(("none", "static", "gated"), costs), TABLE)


def test_nothing_pays_where_nothing_helps():
    found = search_variants(material(), epsilon=0.01, candidates=200)
    assert found.chosen.name == "entropy alone"
    assert set(found.fronts) == {
        "entropy alone", "entropy alone, decay on", "entropy alone, routing on",
    }  # fmt: skip
    plain = found.fronts["entropy alone"][0].cascade
    assert (plain.fusion, plain.adaptive_decay, plain.routes) == ("none", None, ())


def test_a_sharper_risk_is_chosen_unless_it_costs_what_it_saves():
    good = material(better=0.6)
    found = search_variants(good, epsilon=0.01, candidates=200)
    assert found.chosen.fusion == "static"
    assert found.judged["fused"] < found.judged["entropy alone"] - 0.01
    saved = found.judged["entropy alone"] - found.judged["fused"]
    costs = good.costs["none"]
    dear = replace(costs, checkpoints=(replace(costs.checkpoints[0], probe=0.002 + saved),))
    found = search_variants(
        replace(good, costs={"none": costs, "static": dear}), epsilon=0.01, candidates=200
    )
    assert found.chosen.fusion == "none"
    shown = search_variants(replace(good, fusion_pays=False), epsilon=0.01, candidates=200)
    assert shown.chosen.name == "entropy alone"
    assert shown.fronts["fused"]
    assert shown.variants["fused"].fusion == "static"
    assert not any(each.fusion == "static" for n, each in shown.variants.items() if n != "fused")


def test_routing_pays_where_classes_differ():
    found = search_variants(material(by_class=True), epsilon=0.01, candidates=200)
    assert found.chosen.routes
    factors = [rule.threshold for rule in found.chosen.routes]
    # The same harm stands at higher risks in the first two classes.
    assert min(factors[:2]) > max(factors[2:])
    name = found.chosen.name
    assert found.judged[name] < found.judged["entropy alone"] - 0.005


def test_a_class_of_few_tokens_keeps_the_rules_of_all():
    given = material(by_class=True)
    rare = np.where(TABLE == 4, np.uint8(3), TABLE)
    rare[49] = 4
    few = np.where(given.facts.tokens == 49, 48, given.facts.tokens)
    few[:150] = 49
    routes = choose_routes(given.traces["none"], few, rare, given.costs["none"], limit=LIMIT)
    assert routes[4] == ClassRule()
    assert routes[0] != ClassRule()


def test_routed_traces_do_what_the_controller_does():
    given = material(30)
    traces = given.traces["none"]
    routes = tuple(
        ClassRule(float(np.float32(t)), float(np.float32(g)))
        for t, g in ((1.0, 1.0), (0.5, 2.5), (1.5, 0.5), (0.0, 1.0), (2.5, 1.5))
    )
    vectors = random_policies(traces, 40, np.random.default_rng(1))
    routed = routed_traces(traces, given.facts.tokens, TABLE, routes)
    out = _core.replay(
        routed.risk, routed.probability, routed.delta_nll, routed.eligible, routed.doc_offsets,
        vectors.tau, vectors.weight, vectors.gamma, vectors.exit_confidence,
        vectors.min_probability,
    )  # fmt: skip
    total = off = 0
    for p in range(len(vectors)):
        cascade = replace(vectors.cascade(p, (3,)), routes=routes)
        controller = CascadeController(cascade, gates=GateParts(token_classes=TABLE))
        state = controller.start(len(routed.eligible), StepContext(tokens=given.facts.tokens))
        decision = controller.step_risk(0, traces.risk[:, 0].copy(), state, traces.eligible)
        leaving = decision.try_exit
        bar = controller.least_probability(0, state)
        if bar is not None:
            leaving = leaving & (traces.probability[:, 0] >= bar)
        total += int(leaving.sum())
        off += abs(int(leaving.sum()) - int(out["exits"][p, 0]))
    assert total > 1000
    assert off <= total // 500  # a division in place of a product: rounding decides some ties


def test_vectors_of_cascades_are_those_they_came_from():
    vectors = random_policies(material(10).traces["none"], 5, np.random.default_rng(0))
    again = PolicyVectors.of([vectors.cascade(i, (3,)) for i in range(5)])
    for name in ("tau", "weight", "gamma", "exit_confidence", "min_probability"):
        np.testing.assert_array_equal(getattr(again, name), getattr(vectors, name))


def test_the_table_names_a_policy_of_each_variant_within_the_target():
    given = material(better=0.6)
    found = search_variants(given, epsilon=0.01, candidates=200)
    walk = [
        replace(policy, estimated_delta=2.0 * policy.estimated_delta)
        for policy in found.fronts[found.chosen.name][-3:]
    ]
    rows = found.table(walk, [1.0], 0.01)
    assert {row["name"] for row in rows} == set(found.fronts)
    assert sum(row["chosen"] for row in rows) == 1
    for row in rows:
        policy = row["policy"]
        # Deltas were verified at twice what the replay says.
        assert policy is None or 2.0 * policy["estimated_delta"] <= LIMIT * (1 + 1e-6)
    assert sum(row["policy"] is not None for row in rows) >= len(rows) - 1


def test_a_front_of_a_variant_uses_its_parts():
    given = material(40, by_class=True)
    routes = (ClassRule(), ClassRule(0.5), ClassRule(2.0), ClassRule(0.0), ClassRule())
    for policy in front_of(Variant("own", routes=routes), given, candidates=60):
        assert policy.cascade.routes == routes
    assert len(routes) == len(TOKEN_CLASSES)
    assert classes_of(TABLE, np.array([3])) == [3]
    assert isinstance(policy.cascade, CascadeConfig)


def test_what_entropies_cost_counts_against_the_decay():
    judged = [
        search_variants(
            replace(material(), entropy_price=price), epsilon=0.01, candidates=60
        ).judged
        for price in (0.0, 0.05)
    ]
    free, dear = (each["entropy alone, decay on"] - each["entropy alone"] for each in judged)
    # At a lone checkpoint the decay decides nothing, so its price is all there is.
    assert free == pytest.approx(0.0, abs=1e-6)
    assert 0.01 < dear < 0.05


@pytest.mark.parametrize("kind", ["static", "gated"])
def test_kinds_that_were_not_fitted_are_not_searched(kind):
    found = search_variants(material(60), epsilon=0.01, candidates=60)
    assert all(variant.fusion != kind for variant in found.variants.values())
