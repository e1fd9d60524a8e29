from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sedac_hf import _core
from tests.rust import reference

SIZES = st.integers(0, 70)
RISKS = st.floats(width=32, allow_nan=True, allow_infinity=True)
SHARES = st.floats(0, 1, width=32)
PARAMETERS = st.floats(0, 1000, width=32)


@settings(deadline=None)
@given(
    SIZES.flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, n, elements=SHARES), hnp.arrays(np.float32, n, elements=RISKS)
        )
    ),
    PARAMETERS,
    PARAMETERS,
    SHARES,
)
def test_equals_the_reference_to_the_bit(arrays, tau, weight, gamma):
    previous, risk = arrays
    found = _core.batch_confidence_accumulate(previous, risk, tau, weight, gamma)
    expected = reference.accumulate(previous, risk, tau, weight, gamma)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 7, 64, 200_001])
def test_rows_do_not_depend_on_each_other(rows):
    rng = np.random.default_rng(rows)
    previous, risk = rng.random((2, rows), dtype=np.float32)
    together = _core.batch_confidence_accumulate(previous, risk, 0.8, 1.3, 0.9)
    for i in rng.choice(rows, min(rows, 50), replace=False):
        some = slice(i, i + 3)
        alone = _core.batch_confidence_accumulate(previous[some], risk[some], 0.8, 1.3, 0.9)
        np.testing.assert_array_equal(alone.view(np.uint32), together[some].view(np.uint32))


@pytest.mark.parametrize("risk", [np.nan, np.inf, -np.inf])
def test_a_risk_that_is_not_finite_adds_nothing(risk):
    found = _core.batch_confidence_accumulate(
        np.array([0.5], np.float32), np.array([risk], np.float32), 1.0, 1.0, 0.5
    )
    assert found[0] == 0.25


def test_writes_into_out_and_returns_it():
    previous = np.zeros(3, np.float32)
    out = np.full(3, 7, np.float32)
    found = _core.batch_confidence_accumulate(previous, previous, 1.0, 0.5, 0.9, out)
    assert found is out
    np.testing.assert_array_equal(out, np.full(3, 0.5, np.float32))


def test_bad_arguments_are_named():
    floats = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="risk has 3 elements, expected 4"):
        _core.batch_confidence_accumulate(floats, floats[:3], 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="out has 2 elements"):
        _core.batch_confidence_accumulate(floats, floats, 1.0, 1.0, 1.0, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="tau must be finite and at least 0, found NaN"):
        _core.batch_confidence_accumulate(floats, floats, float("nan"), 1.0, 1.0)
    with pytest.raises(ValueError, match="gamma must be finite and at least 0, found -1"):
        _core.batch_confidence_accumulate(floats, floats, 1.0, 1.0, -1.0)
    with pytest.raises(TypeError, match="previous: expected a C-contiguous array"):
        _core.batch_confidence_accumulate(floats[::2], floats[:2], 1.0, 1.0, 1.0)
    with pytest.raises(TypeError):
        _core.batch_confidence_accumulate(np.zeros(4), floats, 1.0, 1.0, 1.0)
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        _core.batch_confidence_accumulate(floats, floats, 1.0, 1.0, 1.0, frozen)
    with pytest.raises(TypeError):
        _core.batch_confidence_accumulate(floats, np.ones(4, np.float32), 1.0, 1.0, 1.0, floats)
