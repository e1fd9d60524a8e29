"""LREProbe: shape, range, dtype, and the packed form that Rust reads."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from sedac_hf.core import compiled, probe_inference
from sedac_hf.core.compiled import Compiled
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


@pytest.fixture
def fresh_program(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    program = Compiled(probe_inference._risk)
    monkeypatch.setattr(probe_inference, "_compiled_risk", program)
    return program


def test_a_compiled_probe_is_the_probe(fresh_program: Compiled) -> None:
    probe = LREProbe(24, 8).eval()
    with torch.no_grad():
        for rows in (1, 5, 64):
            states = 30 * torch.randn(rows, 24)
            torch.testing.assert_close(probe.compiled(states), probe(states))
    if fresh_program.failed:
        pytest.skip("torch.compile needs a C++ compiler here, and the fallback was taken")


def test_a_probe_that_cannot_be_compiled_runs_as_it_is_and_says_so_once(
    fresh_program: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, warnings = [], []

    def broken(function: object, **options: object) -> object:
        def fail(*given: object) -> object:
            tries.append(given)
            raise TorchDynamoException("no compiler\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled.logger, "warning", lambda *given: warnings.append(given))
    probe, states = LREProbe(24, 8).eval(), torch.randn(3, 24)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(probe.compiled(states), probe(states))
    assert len(tries) == len(warnings) == 1
    assert "no compiler" in warnings[0]


def test_the_environment_forbids_compiling(
    fresh_program: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEDAC_COMPILE", "off")
    monkeypatch.setattr(torch, "compile", lambda *given, **more: pytest.fail("compiled"))
    probe, states = LREProbe(24, 8).eval(), torch.randn(3, 24)
    assert torch.equal(probe.compiled(states), probe(states))


def test_graphs_without_a_cuda_device_are_refused() -> None:
    manager = ProbeManager.build(2, 16, 4)
    with pytest.raises(ConfigError, match="CUDA device; the probes are on 'cpu'"):
        manager.setup_cuda_graph(4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_gives_what_the_probe_gives_until_the_probes_move() -> None:
    manager = ProbeManager.build(2, 64, 8).to("cuda").eval()
    manager.setup_cuda_graph(4, torch.float32)
    with torch.no_grad():
        for checkpoint in (0, 1):
            for _ in range(3):
                states = torch.randn(4, 64, device="cuda")
                expected = manager.probes[checkpoint](states)
                torch.testing.assert_close(manager.risk(checkpoint, states), expected)
        # New weights in place are seen; another number of rows goes through the probe itself.
        manager.probes[0].out.bias.add_(1.0)
        states = torch.randn(4, 64, device="cuda")
        torch.testing.assert_close(manager.risk(0, states), manager.probes[0](states))
        assert manager.risk(0, states[:3]).shape == (3,)
        with pytest.raises(ConfigError, match="at least one row"):
            manager.setup_cuda_graph(0)
    assert manager.to("cpu")._graphs is None
    assert copy.deepcopy(manager)._graphs is None
