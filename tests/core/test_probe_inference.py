"""LREProbe: shape, range, dtype, and the packed form that Rust reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.core.probe_inference import LREProbe, ProbeManager
from sedac_hf.errors import ConfigError


def test_risk_is_float32_and_not_negative() -> None:
    probe = LREProbe(12, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        risk = probe(torch.randn(3, 5, 12, dtype=dtype))
        assert risk.dtype == torch.float32
        assert risk.shape == (3, 5)
        assert (risk >= 0).all()


def test_risk_does_not_depend_on_the_size_of_the_state() -> None:
    probe, hidden = LREProbe(32, 8), torch.randn(6, 32)
    torch.testing.assert_close(probe(100 * hidden), probe(1000 * hidden), rtol=1e-3, atol=1e-4)


def test_packed_weights_give_the_same_risk() -> None:
    probe, hidden = LREProbe(16, 4), torch.randn(7, 16)
    with torch.no_grad():
        probe.norm.bias.normal_()
        probe.norm.weight.normal_()
    packed = probe.packed()
    z = hidden.numpy() @ packed.project.T
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + packed.epsilon)
    score = (z * packed.norm_weight + packed.norm_bias) @ packed.out_weight + packed.out_bias
    np.testing.assert_allclose(probe(hidden).detach(), np.logaddexp(score, 0), rtol=1e-5)


def test_packed_weights_are_a_copy() -> None:
    manager = ProbeManager.build(2, 8, 4)
    before = manager.native(1).project
    with torch.no_grad():
        manager.probes[1].project.weight.zero_()
    assert before.any()
    assert not manager.native(1).project.any()


@pytest.mark.parametrize(("width", "rank"), [(0, 4), (8, 0), (-1, 2)])
def test_sizes_must_be_positive(width: int, rank: int) -> None:
    with pytest.raises(ConfigError, match="positive"):
        LREProbe(width, rank)
