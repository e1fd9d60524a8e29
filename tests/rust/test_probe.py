from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf import _core
from tests.rust import reference


def arrays(width: int, rank: int, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    project = normal(rank, width) / np.float32(width**0.5)
    return project, normal(rank), normal(rank), 1e-5, normal(rank), 0.3


def states(rows: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def test_names_the_kernel():
    assert _core.kernel() in {"avx2+fma", "neon", "portable"}


@settings(deadline=None)
@given(st.integers(0, 11), st.integers(1, 90), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_equals_the_definition(rows, width, rank, seed):
    weights = arrays(width, rank, seed)
    hidden = states(rows, width, seed + 1)
    found = _core.Probe(*weights).risk(hidden)
    expected = reference.probe_risk(hidden.astype(np.float64), *weights)
    assert found.shape == (rows,)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_equals_the_definition_closely_at_a_usual_size():
    weights = arrays(576, 64)
    hidden = states(50, 576)
    expected = reference.probe_risk(hidden.astype(np.float64), *weights)
    np.testing.assert_allclose(_core.Probe(*weights).risk(hidden), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
@pytest.mark.parametrize("bits", [torch.uint16, torch.int16])
def test_halves_are_read_exactly(dtype, name, bits):
    probe = _core.Probe(*arrays(72, 24))
    halves = torch.from_numpy(states(9, 72)).to(dtype)
    found = probe.risk(halves.view(bits).numpy(), name)
    np.testing.assert_array_equal(found, probe.risk(halves.float().numpy()))


def test_numpy_halves_are_read_as_they_are():
    probe = _core.Probe(*arrays(72, 24))
    halves = states(9, 72).astype(np.float16)
    np.testing.assert_array_equal(probe.risk(halves, "f16"), probe.risk(halves.astype(np.float32)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.sampled_from([8, 33, 128]), st.sampled_from([4, 16, 40]))
def test_a_row_has_the_same_bits_in_any_company(rows, width, rank):
    probe = _core.Probe(*arrays(width, rank))
    hidden = states(rows, width)
    together = probe.risk(hidden)
    alone = np.concatenate([probe.risk(hidden[i : i + 1]) for i in range(rows)])
    np.testing.assert_array_equal(together.view(np.uint32), alone.view(np.uint32))


def test_the_same_when_threads_share_the_rows():
    probe = _core.Probe(*arrays(576, 64))
    hidden = states(700, 576)
    together = probe.risk(hidden)
    parts = [probe.risk(hidden[i : i + 5]) for i in range(0, 700, 5)]
    np.testing.assert_array_equal(together, np.concatenate(parts))


def test_rows_need_not_be_neighbours():
    probe = _core.Probe(*arrays(16, 8))
    hidden = states(12, 16).reshape(4, 3, 16)
    np.testing.assert_array_equal(probe.risk(hidden[:, -1]), probe.risk(hidden[:, -1].copy()))
    np.testing.assert_array_equal(probe.risk(hidden[::-1, 0]), probe.risk(hidden[::-1, 0].copy()))


def test_any_layout_of_the_weights_is_read_alike():
    project, *rest = arrays(16, 8)
    hidden = states(3, 16)
    expected = _core.Probe(project, *rest).risk(hidden)
    found = _core.Probe(np.asfortranarray(project), *rest).risk(hidden)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_has_no_finite_risk(bad):
    probe = _core.Probe(*arrays(16, 8))
    hidden = states(5, 16)
    expected = probe.risk(hidden)
    hidden[2, 7] = bad
    found = probe.risk(hidden)
    assert np.isnan(found[2])
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(found[others], expected[others])


def test_bad_arrays_are_named():
    project, norm_weight, norm_bias, eps, out_weight, out_bias = arrays(16, 8)
    rest = (norm_bias, eps, out_weight, out_bias)
    with pytest.raises(ValueError, match=r"project has 128 elements, expected 112"):
        _core.Probe(project, norm_weight[:7], *rest)
    with pytest.raises(ValueError, match="norm_bias has 7 elements, expected 8"):
        _core.Probe(project, norm_weight, norm_bias[:7], eps, out_weight, out_bias)
    with pytest.raises(ValueError, match="width must be at least 1"):
        _core.Probe(project[:, :0], norm_weight, *rest)
    empty = np.zeros(0, np.float32)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        _core.Probe(project[:0], empty, empty, eps, empty, out_bias)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        _core.Probe(project, norm_weight, norm_bias, -1.0, out_weight, out_bias)
    broken = project.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"project\[18\] must be finite, found NaN"):
        _core.Probe(broken, norm_weight, *rest)


def test_bad_states_are_refused():
    probe = _core.Probe(*arrays(16, 8))
    hidden = states(3, 16)
    with pytest.raises(ValueError, match="has 15 elements, expected 16"):
        probe.risk(np.ascontiguousarray(hidden[:, :15]))
    with pytest.raises(TypeError, match="found a float64 array of 2 dimensions"):
        probe.risk(hidden.astype(np.float64))
    with pytest.raises(TypeError, match="found a float32 array of 1 dimensions"):
        probe.risk(hidden[0])
    with pytest.raises(TypeError, match="found a float32 array"):
        probe.risk(hidden, "bf16")
    with pytest.raises(TypeError, match="found a float16 array"):
        probe.risk(hidden.astype(np.float16), "bf16")
    with pytest.raises(TypeError, match="list"):
        probe.risk([[0.0] * 16])
    with pytest.raises(TypeError, match="neighbours in memory"):
        probe.risk(np.asfortranarray(hidden))
    with pytest.raises(ValueError, match='dtype "f64" is not supported'):
        probe.risk(hidden, "f64")
