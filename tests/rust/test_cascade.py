from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sedac_hf import _core
from tests.rust import reference

SHARES = st.floats(0, 1, width=32)
RISKS = st.floats(0, 4, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, -1.0])


@st.composite
def cascades(draw):
    count = draw(st.integers(1, 5))

    def values(high):
        return draw(hnp.arrays(np.float32, count, elements=st.floats(0, high, width=32)))

    return values(3.0), values(2.0), values(1.0), values(1.25)


@settings(deadline=None)
@given(cascades(), st.data())
def test_steps_equal_the_reference_to_the_bit(rules, data):
    rows = data.draw(st.integers(0, 9))
    core, slow = _core.Cascade(*rules), reference.Cascade(*rules)
    np.testing.assert_array_equal(core.max_confidence, slow.most)
    state = np.zeros(rows, np.float32)
    expected = np.zeros(rows, np.float32)
    active = np.ones(rows, np.bool_)
    for k in range(core.num_checkpoints):
        risk = data.draw(hnp.arrays(np.float32, rows, elements=RISKS))
        active &= data.draw(hnp.arrays(np.bool_, rows))
        _, share, trying, tries = core.step_risk(k, risk, state, active)
        assert tries == trying.sum()
        for row in range(rows):
            if not active[row]:
                assert np.isnan(share[row])
                assert not trying[row]
                continue
            expected[row], normalised, tried = slow.step(k, risk[row], expected[row])
            assert (share[row], trying[row]) == (normalised, tried)
            assert 0 <= share[row] <= 1
            assert np.isfinite(risk[row]) or not trying[row]
        np.testing.assert_array_equal(state, expected)


def probe(width: int, seed: int) -> _core.Probe:
    rng = np.random.default_rng(seed)
    draw = [rng.standard_normal(s).astype(np.float32) for s in ((8, width), 8, 8, 8)]
    return _core.Probe(draw[0], draw[1], draw[2], 1e-5, draw[3], 0.0)


def vector(value: float, count: int = 2) -> np.ndarray:
    return np.full(count, value, np.float32)


def with_probes() -> tuple[_core.Cascade, list[_core.Probe]]:
    probes = [probe(16, seed) for seed in (1, 2)]
    rules = vector(1.5), vector(1.0), vector(0.9), vector(0.3)
    return _core.Cascade(*rules, probes), probes


def test_a_fused_step_is_the_probe_then_the_rule():
    cascade, probes = with_probes()
    hidden = np.random.default_rng(3).standard_normal((7, 16)).astype(np.float32)
    active = np.array([True, True, False, True, False, True, True])
    fused, apart = np.zeros(7, np.float32), np.zeros(7, np.float32)
    for k in range(2):
        risk, share, trying, tries = cascade.step(k, hidden, "f32", fused, active)
        np.testing.assert_array_equal(risk[active], probes[k].risk(hidden)[active])
        assert np.isnan(risk[~active]).all()
        expected = cascade.step_risk(k, probes[k].risk(hidden), apart, active)
        np.testing.assert_array_equal(share, expected[1])
        np.testing.assert_array_equal(trying, expected[2])
        assert tries == expected[3]
    np.testing.assert_array_equal(fused, apart)
    assert (fused[~active] == 0).all()


def test_everyone_is_active_by_default():
    cascade, _ = with_probes()
    hidden = np.random.default_rng(4).standard_normal((5, 16)).astype(np.float32)
    one = cascade.step(0, hidden, "f32", np.zeros(5, np.float32))
    two = cascade.step(0, hidden, "f32", np.zeros(5, np.float32), np.ones(5, np.bool_))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_state_that_is_not_finite_never_exits():
    probes = [probe(16, 1)]
    eager = _core.Cascade(vector(9, 1), vector(1, 1), vector(1, 1), vector(0, 1), probes)
    hidden = np.random.default_rng(5).standard_normal((3, 16)).astype(np.float32)
    hidden[1, 4] = np.nan
    hidden[2, 4] = np.inf
    _, share, trying, tries = eager.step(0, hidden, "f32", np.zeros(3, np.float32))
    assert trying.tolist() == [True, False, False]
    assert (tries, share[1], share[2]) == (1, 0, 0)


def test_misuse_is_named():
    cascade, probes = with_probes()
    hidden = np.zeros((2, 16), np.float32)
    state = np.zeros(2, np.float32)
    with pytest.raises(IndexError, match=r"checkpoint 2 does not exist.* 2 \(0 to 1\)"):
        cascade.step(2, hidden, "f32", state)
    with pytest.raises(OverflowError):
        cascade.step(-1, hidden, "f32", state)
    with pytest.raises(ValueError, match="confidence has 3 elements, expected 2"):
        cascade.step(0, hidden, "f32", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="active has 1 elements, expected 2"):
        cascade.step(0, hidden, "f32", state, np.ones(1, np.bool_))
    with pytest.raises(TypeError):
        cascade.step(0, hidden, "f32", np.zeros(2))
    bare = _core.Cascade(vector(1), vector(1), vector(1), vector(1))
    with pytest.raises(ValueError, match="without probes"):
        bare.step(0, hidden, "f32", state)
    with pytest.raises(ValueError, match="probes has 1 elements, expected 2"):
        _core.Cascade(vector(1), vector(1), vector(1), vector(1), probes[:1])
    with pytest.raises(ValueError, match="width has 15 elements, expected 16"):
        _core.Cascade(vector(1), vector(1), vector(1), vector(1), [probes[0], probe(15, 3)])
    with pytest.raises(ValueError, match="number of checkpoints must be at least 1"):
        _core.Cascade(*[np.zeros(0, np.float32)] * 4)
    with pytest.raises(ValueError, match=r"exit_confidence\[0\] must be finite"):
        _core.Cascade(vector(1), vector(1), vector(1), vector(np.nan))
