from __future__ import annotations

import math
import time

import numpy as np
import pytest

from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.certify import certify, walk
from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.policy_search import choose_policies, verify
from sedac_hf.errors import CalibrationError
from tests.calibration.synthetic import cost_model
from tests.evaluation.fake_model import FakeModel, documents, policy, slow_scores

THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.2, 1.0)


@pytest.fixture(scope="module")
def certified():
    model = FakeModel()
    fresh, held_out = documents(300, seed=1), documents(80, seed=2)
    certificate = certify(
        model,
        fresh,
        [policy(t) for t in THRESHOLDS],
        other_splits={"search": documents(50, seed=3)},
        held_out=held_out,
    )
    return model, fresh, held_out, certificate


def true_deltas(model, some, threshold):
    rows = [(slow_scores(model, d, threshold), slow_scores(model, d, None)) for d in some]
    return np.array([(a[0] - b[0]) / b[1] for a, b in rows if b[2]])


def test_the_walk_stops_at_the_first_failure_and_deploys_the_one_before(certified):
    _, _, _, certificate = certified
    assert 0 < certificate.accepted < len(THRESHOLDS)
    assert len(certificate.walk) == certificate.accepted + 1
    passed = [rung.result.p_value <= 0.1 for rung in certificate.walk]
    assert passed == [True] * certificate.accepted + [False]
    deployed = certificate.policy.cascade.layers[0].threshold
    assert deployed == THRESHOLDS[certificate.accepted - 1]


def test_losses_are_those_of_the_forward_with_stale_keys_and_values(certified):
    model, fresh, _, certificate = certified
    for rung, threshold in zip(certificate.walk, THRESHOLDS, strict=False):
        want = true_deltas(model, fresh, threshold)
        assert rung.result.mean == pytest.approx(want.mean(), abs=1e-6)
    assert certificate.documents == len(want)
    low, high = certificate.interval
    mean = certificate.deployed.result.mean
    assert low < mean < high
    assert certificate.ppl_increase == pytest.approx(math.expm1(mean))


def test_conditions_are_recorded(certified):
    _, fresh, _, certificate = certified
    assert (certificate.dtype, certificate.kv_mode) == ("float32", "propagate")
    assert certificate.fingerprint == {"shape": "ab", "weights": "cd"}
    assert set(certificate.splits) == {"certification", "search", "held_out"}
    assert certificate.documents + certificate.left_out == len(fresh)
    assert {"torch", "transformers", "python", "sedac_hf"} <= set(certificate.versions)
    assert certificate.needed_documents is None
    assert 0 < certificate.tail_upper < 0.05


def test_the_held_out_check_is_of_the_deployed_policy(certified):
    model, _, held_out, certificate = certified
    threshold = certificate.policy.cascade.layers[0].threshold
    want = true_deltas(model, held_out, threshold)
    assert certificate.held_out.documents == len(want)
    assert certificate.held_out.mean_delta == pytest.approx(want.mean(), abs=1e-6)
    assert certificate.held_out.holds == (want.mean() <= math.log1p(0.01))


def test_the_order_of_the_documents_does_not_matter(certified):
    model, fresh, held_out, certificate = certified
    again = certify(
        model,
        fresh[::-1],
        [policy(t) for t in THRESHOLDS],
        other_splits={"search": documents(50, seed=3)},
        held_out=held_out,
    )
    assert again == certificate


def test_later_policies_are_not_run_after_a_failure():
    model = FakeModel()
    certificate = certify(model, documents(100), [policy(5.0), policy(0.001), policy(0.001)])
    assert certificate.accepted == 0
    assert certificate.policy is None
    assert [how for how, _ in model.forwards] == ["off", "simulate"]
    assert "exits stay off" in certificate.statement()


def test_too_few_documents_are_told_how_many_would_do():
    model = FakeModel()
    few = certify(model, documents(12), [policy(0.004)])
    assert few.accepted == 0
    assert few.needed_documents > 12
    more = few.needed_documents - few.documents
    assert f"About {more} more documents" in few.statement()
    enough = certify(model, documents(2 * few.needed_documents, seed=9), [policy(0.004)])
    assert enough.accepted == 1


def test_a_policy_that_is_bad_is_not_helped_by_documents():
    certificate = certify(FakeModel(), documents(60), [policy(2.0)])
    assert certificate.needed_documents is None
    assert "More documents would not change that" in certificate.statement()


def test_no_policies_mean_no_exits():
    certificate = certify(FakeModel(), documents(30), [])
    assert certificate.policy is None
    assert "No policy was found" in certificate.statement()


def test_nan_under_exits_counts_against_the_policy():
    some = documents(200)
    model = FakeModel()
    model.poison = {"simulate": 9}
    certificate = certify(model, some, [policy(0.0)])
    hit = sum(9 in d.ids[2:-1] for d in some if len(d) > 4)
    assert certificate.walk[0].result.beyond_clip == hit
    assert certificate.accepted == 0
    assert certificate.documents == len(some)


def test_documents_that_the_base_cannot_score_are_left_out_and_counted():
    some = [*documents(100), Document(np.arange(6), 5)]
    model = FakeModel()
    model.poison = {"always": 9}
    certificate = certify(model, [*some, some[0]], [policy(0.001)])
    hit = sum(9 in d.ids[2:-1] for d in some[:-1])
    # Besides: one without a decode step, one that is there twice.
    assert certificate.left_out == hit + 2
    assert certificate.walk[0].result.beyond_clip == 0


def test_splits_that_overlap_are_refused():
    some = documents(20)
    with pytest.raises(CalibrationError, match="3 of 20 certification documents"):
        certify(FakeModel(), some, [policy(0.1)], other_splits={"training": some[:3]})
    with pytest.raises(CalibrationError, match="certification"):
        certify(FakeModel(), some, [policy(0.1)], held_out=some[:3])
    train = documents(5, seed=5)
    splits = {"held_out": train[:1], "other_splits": {"training": train}}
    with pytest.raises(CalibrationError, match="held_out"):
        certify(FakeModel(), some, [policy(0.1)], **splits)


def test_nothing_testable_is_refused():
    with pytest.raises(CalibrationError, match="no documents"):
        certify(FakeModel(), [], [policy(0.1)])
    with pytest.raises(CalibrationError, match="none of 1 documents"):
        certify(FakeModel(), [Document(np.arange(6), 5)], [policy(0.1)])


def test_a_deadline_ends_the_walk_after_the_first_policy():
    model = FakeModel()
    certificate = certify(
        model, documents(300), [policy(0.001), policy(0.002)], deadline=time.monotonic()
    )
    assert certificate.accepted == len(certificate.walk) == 1


def test_walk_calls_lazily_and_counts_what_passed():
    asked = []

    def deltas_of(index):
        asked.append(index)
        return np.full(200, 0.05 if index == 2 else 0.0)

    found = walk(deltas_of, 5, RiskTarget())
    assert asked == [0, 1, 2]
    assert found.accepted == 2
    assert len(found.results) == 3
    assert walk(deltas_of, 2, RiskTarget()).accepted == 2


def test_verify_gives_a_row_for_each_policy():
    model, some = FakeModel(), documents(10)
    found = verify(model, some, [policy(0.1), policy(0.4)])
    assert found.shape == (2, 10)
    want = true_deltas(model, some, 0.4)
    np.testing.assert_allclose(found[1][~np.isnan(found[1])], want, atol=1e-5)
    assert verify(model, some, []).shape == (0, 10)


@pytest.fixture
def half_the_truth(monkeypatch):
    """A front whose replay says half of what the true forward finds; counts what is verified."""
    front = [policy(float(t)) for t in np.linspace(0.0005, 0.03, 60)]
    verified = []
    home = "sedac_hf.calibration.policy_search."
    monkeypatch.setattr(home + "pareto_front", lambda *_, **__: front)

    def twice(model, some, policies, **_):
        thresholds = [p.cascade.layers[0].threshold for p in policies]
        verified.extend(thresholds)
        return np.stack([np.full(4, 2 * threshold) for threshold in thresholds])

    monkeypatch.setattr(home + "verify", twice)
    return verified


def test_choice_corrects_for_what_the_replay_does_not_see(half_the_truth):
    chosen = choose_policies(FakeModel(), None, documents(4), cost_model(), rungs=6, margin=1.5)
    limit = math.log1p(0.01)
    assert len(chosen) == 6
    assert chosen[-1].estimated_delta <= 1.5 * limit
    assert any(limit < p.estimated_delta for p in chosen)
    for chosen_policy in chosen:
        threshold = chosen_policy.cascade.layers[0].threshold
        assert chosen_policy.estimated_delta == pytest.approx(2 * threshold)
    assert len(half_the_truth) == len(set(half_the_truth))


def test_choice_stops_verifying_when_time_is_up(half_the_truth):
    settings = {"rungs": 6, "margin": 1.5}
    whole = choose_policies(FakeModel(), None, documents(4), cost_model(), **settings)
    half_the_truth.clear()
    hasty = choose_policies(
        FakeModel(), None, documents(4), cost_model(), deadline=time.monotonic(), **settings
    )
    assert len(half_the_truth) == 3
    assert [p.cascade for p in hasty] == [p.cascade for p in whole]
    assert hasty[-1].estimated_delta == pytest.approx(whole[-1].estimated_delta)
