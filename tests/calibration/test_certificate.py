from __future__ import annotations

import json
import math

import pytest

from sedac_hf.calibration.bounds import RiskTarget, TestResult
from sedac_hf.calibration.certificate import Certificate, HeldOutCheck, Rung
from sedac_hf.errors import CertificateError
from tests.evaluation.fake_model import policy


def rung(p_value, threshold=0.1, mean=0.004):
    result = TestResult(
        mean=mean,
        clipped_mean=0.004,
        beyond_clip=1,
        p_betting=p_value,
        p_hoeffding_bentkus=min(1.0, 5 * p_value),
        p_tail=p_value / 2,
    )
    return Rung(policy(threshold), result, exit_share=0.2, mean_depth=5.0)


def certificate(*p_values, accepted=None, **changes):
    walk = tuple(rung(p, 0.1 * (i + 1)) for i, p in enumerate(p_values))
    passed = next((i for i, p in enumerate(p_values) if p > 0.1), len(p_values))
    values = {
        "target": RiskTarget(),
        "walk": walk,
        "accepted": passed if accepted is None else accepted,
        "documents": 150,
        "left_out": 2,
        "dtype": "bfloat16",
        "kv_mode": "propagate",
        "splits": {"certification": "0" * 16},
        "interval": (0.001, 0.007),
        "tail_upper": 0.02,
        "fingerprint": {"shape": "ab"},
        "held_out": HeldOutCheck(40, 0.005, (0.002, 0.008), 0.19, True),
        "versions": {"torch": "2"},
    }
    return Certificate(**(values | changes))


def test_json_round_trip(tmp_path):
    for original in (
        certificate(0.01, 0.05, 0.3),
        certificate(0.4, interval=None, tail_upper=None, held_out=None, needed_documents=400),
        certificate(interval=None, tail_upper=None, held_out=None),
    ):
        assert Certificate.from_json(original.to_json()) == original
        original.save(tmp_path / "certificate.json")
        assert Certificate.load(tmp_path / "certificate.json") == original
    assert [p.name for p in tmp_path.iterdir()] == ["certificate.json"]


def test_json_is_strict_even_where_a_loss_is_infinite():
    walk = (rung(0.5, mean=math.inf),)
    original = certificate(0.5, walk=walk, interval=None, held_out=None)
    text = original.to_json()

    def refuse(name):
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)
    assert Certificate.from_json(text).walk[0].result.mean == math.inf


def test_what_saving_an_artefact_adds_is_accepted():
    values = certificate(0.01, 0.3).to_dict() | {"tensors_sha256": "f" * 64}
    assert Certificate.from_dict(values) == certificate(0.01, 0.3)


def test_the_last_policy_that_passed_is_deployed():
    assert certificate(0.01, 0.05, 0.3).policy == policy(0.2)
    assert certificate(0.01, 0.05).policy == policy(0.2)
    assert certificate(0.3).policy is None
    assert certificate(0.3).ppl_increase is None


@pytest.mark.parametrize(
    "change",
    [
        {"accepted": 3},
        {"accepted": 1},
        {"walk": (rung(0.01), rung(0.3), rung(0.01)), "accepted": 1},
    ],
    ids=["one too many", "one too few", "walked on after a failure"],
)
def test_a_number_that_does_not_follow_from_the_p_values_is_refused(change):
    with pytest.raises(CertificateError, match="follow from its"):
        certificate(0.01, 0.05, 0.3, **change)


@pytest.mark.parametrize("p_value", [-0.1, 1.5, math.nan])
def test_impossible_p_values_are_refused(p_value):
    with pytest.raises(CertificateError, match="p-values"):
        certificate(walk=(rung(p_value),), accepted=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v.pop("walk"), "malformed"),
        (lambda v: v.update(version=2), "format 2"),
        (lambda v: v.pop("version"), "format None"),
        (lambda v: v.update(surprise=1), "malformed"),
        (lambda v: v["target"].update(delta=2.0), "malformed"),
        (lambda v: v["walk"][0]["policy"]["layers"][0].update(threshold="x"), "malformed"),
        (lambda v: v["walk"][0]["policy"]["layers"][0].update(threshold=math.nan), "malformed"),
        (lambda v: v.update(interval=[1.0]), "malformed"),
        (lambda v: v.update(documents=0), "counts 0 documents"),
        (lambda v: v["walk"][0]["result"].update(p_betting=0.9), "0 follow"),
    ],
)
def test_damaged_records_are_refused_with_the_reason(damage, message):
    values = certificate(0.01, 0.05, 0.3).to_dict()
    damage(values)
    with pytest.raises(CertificateError, match=message):
        Certificate.from_dict(json.loads(json.dumps(values)))


def test_files_that_are_no_certificate_are_named(tmp_path):
    path = tmp_path / "certificate.json"
    with pytest.raises(CertificateError, match=r"certificate\.json cannot be read"):
        Certificate.load(path)
    for content, message in ((b"{", "not valid JSON"), (b"[]", "JSON object"), (b"\xff", "read")):
        path.write_bytes(content)
        with pytest.raises(CertificateError, match=message) as caught:
            Certificate.load(path)
        assert str(path) in str(caught.value)


def test_uses_that_were_not_tested_are_refused():
    passed = certificate(0.01, 0.3)
    passed.check_covers(dtype="bfloat16", kv_mode="propagate", cascade=policy(0.1).cascade)
    with pytest.raises(CertificateError, match=r"data type 'bfloat16'.*'float32'"):
        passed.check_covers(dtype="float32", kv_mode="propagate")
    with pytest.raises(CertificateError, match="K/V mode"):
        passed.check_covers(dtype="bfloat16", kv_mode="settle")
    with pytest.raises(CertificateError, match="thresholds in use"):
        passed.check_covers(dtype="bfloat16", kv_mode="propagate", cascade=policy(0.2).cascade)
    with pytest.raises(CertificateError, match="exits stay off"):
        certificate(0.3).check_covers(dtype="bfloat16", kv_mode="propagate")


def test_the_statement_says_what_was_shown_and_under_which_conditions():
    text = certificate(0.01, 0.3).statement()
    for part in ("90%", "at most 1.0%", "150 documents", "bfloat16", "propagate", "0.1 nats", "5%"):
        assert part in text


def test_what_a_policy_was_expected_to_cost_is_known_by_its_rules():
    found = certificate(0.01, 0.02)
    for step in found.walk:
        assert found.cost_of(step.policy.cascade) == step.policy.cost
    assert found.cost_of(policy(0.777).cascade) is None
