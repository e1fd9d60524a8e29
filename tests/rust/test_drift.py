from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sedac_hf import _core
from tests.rust import reference

ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
EDGE = st.floats(-1e6, 1e6, width=32)
COUNT = st.floats(0, 1e6)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 60), elements=ANY),
    hnp.arrays(np.float32, st.integers(0, 8), elements=EDGE),
)
def test_histogram_equals_the_definition(values, edges):
    edges = np.sort(edges)
    found = _core.histogram(values, edges)
    assert found.tolist() == reference.histogram(values, edges).tolist()
    assert found.sum() == len(values)


@settings(deadline=None)
@given(
    st.integers(1, 20).flatmap(
        lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=COUNT) for _ in range(2)])
    ),
    st.floats(1e-3, 10),
)
def test_divergence_equals_the_definition(pair, prior):
    live, calibration = pair
    found = _core.kl_divergence(live, calibration, prior)
    assert found == pytest.approx(reference.kl_divergence(live, calibration, prior), abs=1e-9)
    assert 0 <= found < np.inf


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 20), elements=COUNT), st.floats(0.1, 5))
def test_what_is_alike_does_not_diverge(counts, prior):
    assert _core.kl_divergence(counts, counts, prior) == pytest.approx(0, abs=1e-12)
    order = np.random.default_rng(0).permutation(len(counts))
    other = counts[::-1].copy()
    # The order of the bins means nothing.
    assert _core.kl_divergence(counts[order], other[order], prior) == pytest.approx(
        _core.kl_divergence(counts, other, prior), abs=1e-9
    )


def test_more_bins_never_tell_less():
    rng = np.random.default_rng(3)
    for _ in range(50):
        live, calibration = rng.integers(1, 500, (2, 8)).astype(np.float64)
        fine = _core.kl_divergence(live, calibration, 1e-9)
        merged = [x.reshape(4, 2).sum(1) for x in (live, calibration)]
        assert _core.kl_divergence(*merged, 1e-9) <= fine + 1e-9


@pytest.mark.parametrize(
    ("values", "edges", "message"),
    [
        ([0.0], [1.0, 0.0], r"edges\[1\]"),
        ([0.0], [np.nan], r"edges\[0\]"),
        ([0.0], [np.inf], r"edges\[0\]"),
    ],
)
def test_edges_that_are_none_are_refused(values, edges, message):
    with pytest.raises(ValueError, match=message):
        _core.histogram(np.array(values, np.float32), np.array(edges, np.float32))


def test_other_types_and_gaps_are_refused():
    with pytest.raises(TypeError):
        _core.histogram(np.zeros(4), np.zeros(1, np.float32))
    with pytest.raises(TypeError, match="contiguous"):
        _core.histogram(np.zeros(8, np.float32)[::2], np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("live", "calibration", "prior"),
    [
        ([1.0], [1.0, 2.0], 0.5),
        ([], [], 0.5),
        ([1.0], [1.0], 0.0),
        ([1.0], [1.0], np.nan),
        ([-1.0], [1.0], 0.5),
        ([1.0], [np.inf], 0.5),
    ],
)
def test_counts_that_are_none_are_refused(live, calibration, prior):
    with pytest.raises(ValueError, match=r"must be|elements"):
        _core.kl_divergence(np.array(live, float), np.array(calibration, float), prior)
