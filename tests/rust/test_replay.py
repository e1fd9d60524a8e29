from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf import _core
from tests.rust import reference


def traces(lengths: list[int], checkpoints: int, seed: int) -> dict:
    """Documents with risks of every kind, finite or not."""
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    shape = (tokens, checkpoints)
    risk = rng.gamma(1.0, 1.0, shape).astype(np.float32)
    odd = rng.random(shape) < 0.1
    risk[odd] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0], np.float32), odd.sum())
    probability = rng.random(shape, dtype=np.float32)
    probability[rng.random(shape) < 0.1] = np.nan
    return {
        "risk": risk,
        "probability": probability,
        "delta_nll": rng.normal(0.1, 1.0, shape).astype(np.float32),
        "eligible": rng.random(tokens) < 0.8,
        "doc_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }


def policies(count: int, checkpoints: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def values(high: float, zeros: float) -> np.ndarray:
        found = rng.uniform(0, high, (count, checkpoints)).astype(np.float32)
        found[rng.random((count, checkpoints)) < zeros] = 0
        return found

    return {
        "tau": values(2.0, 0.1),
        "weight": values(1.0, 0.1),
        "gamma": values(1.0, 0.1),
        "exit_confidence": values(0.9, 0.1),
        "min_probability": values(1.0, 0.5),
    }


def assert_equals_reference(data: dict, rules: dict) -> None:
    found = _core.replay(**data, **rules)
    assert found["tokens"] == len(data["eligible"])
    for p in range(len(rules["tau"])):
        one = {name: values[p] for name, values in rules.items()}
        least = one.pop("min_probability")
        delta, exits, tries = reference.replay(
            **data, cascade=reference.Cascade(**one), min_probability=least
        )
        assert found["exits"][p].tolist() == exits
        assert found["tries"][p].tolist() == tries
        np.testing.assert_allclose(found["doc_delta"][p], delta, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_equals_a_token_by_token_replay(lengths, checkpoints, count, seed):
    assert_equals_reference(
        traces(lengths, checkpoints, seed), policies(count, checkpoints, seed + 1)
    )


def test_equals_a_token_by_token_replay_over_long_documents():
    assert_equals_reference(traces([1, 700, 16, 1100], 3, 11), policies(3, 3, 12))


def test_is_the_rule_that_the_cascade_applies():
    data, rules = traces([50, 30], 3, 5), policies(20, 3, 6)
    rules["min_probability"][:] = 0
    found = _core.replay(**data, **rules)
    for p in range(20):
        cascade = _core.Cascade(
            *(rules[name][p] for name in ("tau", "weight", "gamma", "exit_confidence"))
        )
        active, state = data["eligible"].copy(), np.zeros(80, np.float32)
        for k in range(3):
            risk = np.ascontiguousarray(data["risk"][:, k])
            _, _, trying, tries = cascade.step_risk(k, risk, state, active)
            assert found["tries"][p, k] == found["exits"][p, k] == tries
            active &= ~trying
    assert found["exits"].sum() > 200


def test_policies_do_not_depend_on_each_other():
    data, rules = traces([300, 900, 5], 2, 1), policies(40, 2, 2)
    together = _core.replay(**data, **rules)
    for p in (0, 17, 39):
        alone = _core.replay(**data, **{name: v[p : p + 1] for name, v in rules.items()})
        for name in ("doc_delta", "exits", "tries"):
            np.testing.assert_array_equal(alone[name][0], together[name][p])


def test_no_policies_are_an_empty_result():
    found = _core.replay(**traces([4, 5], 2, 1), **policies(0, 2, 2))
    assert found["doc_delta"].shape == (0, 2)
    assert found["exits"].shape == found["tries"].shape == (0, 2)


def test_other_threads_run_meanwhile():
    data, rules = traces([200_000], 2, 1), policies(1000, 2, 2)
    worker = threading.Thread(target=_core.replay, kwargs=data | rules)
    ticks = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    # With the interpreter held, the first sleep would outlast the whole call.
    assert ticks > 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("risk", lambda a: a[:-1], "risk has 8 elements, expected 9"),
        ("delta_nll", lambda a: np.ascontiguousarray(a[:, :1]), "delta_nll has 1 elements"),
        ("doc_offsets", lambda a: a[:0], "doc_offsets has 0 elements, expected 1"),
        ("doc_offsets", lambda a: a + 1, r"doc_offsets\[0\] must be 0"),
        ("doc_offsets", lambda a: a[:-1], r"doc_offsets\[1\] must be the number of tokens"),
        ("doc_offsets", lambda a: a[[0, 1, 1, 2]], r"doc_offsets\[2\].*no empty documents"),
        ("gamma", lambda a: a[:2], "gamma has 2 elements, expected 3"),
        ("tau", lambda a: a * np.nan, "tau must be finite and at least 0, found NaN"),
        ("min_probability", lambda a: a - 2, "min_probability of policy 0 must be finite"),
    ],
)
def test_bad_input_is_named(name, change, message):
    arguments = traces([4, 5], 2, 1) | policies(3, 2, 2)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        _core.replay(**arguments)


def test_other_types_and_layouts_are_refused():
    arguments = traces([4, 5], 2, 1) | policies(3, 2, 2)
    with pytest.raises(TypeError):
        _core.replay(**(arguments | {"risk": arguments["risk"].astype(np.float64)}))
    with pytest.raises(TypeError, match="risk: expected a C-contiguous array"):
        _core.replay(**(arguments | {"risk": np.asfortranarray(arguments["risk"])}))
    nothing = {name: values[:, :0] for name, values in arguments.items() if values.ndim == 2}
    with pytest.raises(ValueError, match="number of checkpoints must be at least 1"):
        _core.replay(**(arguments | nothing))
