from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.core.aiming import aim_thresholds
from sedac_hf.core.cascade_controller import (
    CascadeConfig,
    CascadeController,
    LayerConfig,
)
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.errors import ConfigError, SedacError

WIDTH = 48


def config(*thresholds: float, **fields: float) -> CascadeConfig:
    layers = [LayerConfig(2 * k + 1, tau, **fields) for k, tau in enumerate(thresholds)]
    return CascadeConfig(layers)


@pytest.fixture(scope="module")
def probes() -> ProbeManager:
    torch.manual_seed(0)
    manager = ProbeManager.build(2, WIDTH, 24)
    for probe in manager.probes:
        torch.nn.init.normal_(probe.norm.bias)
        torch.nn.init.normal_(probe.norm.weight)
    return manager


@pytest.fixture(scope="module")
def controller(probes) -> CascadeController:
    return CascadeController(config(1.2, 1.0), [probes.native(k) for k in range(2)])


def states(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(controller: CascadeController, hidden: torch.Tensor) -> list[np.ndarray]:
    """Risk, confidence and tries at every checkpoint, when nobody leaves."""
    state = controller.start(len(hidden))
    steps = [controller.step(k, hidden, state) for k in range(controller.num_checkpoints)]
    return [array for step in steps for array in step[:3]]


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            ("threshold", -0.1, "at least 0"),
            ("threshold", math.nan, "finite"),
            ("threshold", math.inf, "finite"),
            ("threshold", 1e39, "finite"),
            ("threshold", "1", "finite"),
            ("threshold", True, "finite"),
            ("weight", -1.0, "at least 0"),
            ("decay", 1.1, "from 0 to 1"),
            ("exit_confidence", -0.5, "at least 0"),
            ("min_probability", 1.5, "from 0 to 1"),
            ("temperature", 0.0, "above 0"),
            ("temperature", math.nan, "above 0"),
        ],
    )
    def test_values_that_cannot_work_are_refused(self, field, value, allowed):
        fields = {"threshold": 1.0} | {field: value}
        with pytest.raises(ConfigError, match=f"after layer 3: {field} must be .*{allowed}"):
            LayerConfig(3, **fields)

    @pytest.mark.parametrize("layer_idx", [-2, 1.0, True, "1"])
    def test_layers_that_do_not_exist_are_refused(self, layer_idx):
        with pytest.raises(ConfigError, match="layer_idx must be"):
            LayerConfig(layer_idx, 1.0)

    def test_the_embedding_is_a_checkpoint(self):
        assert CascadeConfig([LayerConfig(-1, 1.0), LayerConfig(0, 1.0)]).layer_indices == (-1, 0)

    def test_cascades_must_be_in_order(self):
        with pytest.raises(ConfigError, match="at least one checkpoint"):
            CascadeConfig([])
        for order in ([4, 2], [3, 3]):
            with pytest.raises(ConfigError, match="increasing order"):
                CascadeConfig([LayerConfig(layer, 1.0) for layer in order])

    def test_unknown_strategies_and_rates_are_refused(self):
        layers = [LayerConfig(1, 1.0)]
        with pytest.raises(ConfigError, match="strategy must be one of"):
            CascadeConfig(layers, strategy="hopeful")
        for rate in (0.0, 1.0, math.nan):
            with pytest.raises(ConfigError, match="target_exit_rate"):
                CascadeConfig(layers, target_exit_rate=rate)

    def test_every_error_is_one_of_ours(self):
        with pytest.raises(SedacError):
            LayerConfig(1, -1.0)

    def test_equal_rules_are_equal_and_hash_alike(self):
        assert config(1.0, 2.0) == CascadeConfig(tuple(config(1.0, 2.0).layers))
        assert len({config(1.0, 2.0), config(1.0, 2.0), config(1.0, 3.0)}) == 2


class TestTensors:
    def test_round_trip(self):
        layers = [
            LayerConfig(2, 0.7, 1.3, 0.8, 0.55, 0.4, 0.9),
            LayerConfig(5, 0.5, 0.2, 0.3, 2.0, 0.0, 1.7),
        ]
        before = CascadeConfig(layers, target_exit_rate=0.25)
        tensors = before.to_tensors()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2,)}
        after = CascadeConfig.from_tensors(tensors, [2, 5], target_exit_rate=0.25)
        for name in ("threshold", "weight", "decay", "exit_confidence", "min_probability"):
            np.testing.assert_array_equal(after.array(name), before.array(name))
        assert after.layer_indices == before.layer_indices
        assert CascadeConfig.from_tensors(after.to_tensors(), [2, 5], target_exit_rate=0.25) == (
            after
        )

    def test_damage_is_named(self):
        tensors = config(1.0, 2.0).to_tensors()
        missing = {name: t for name, t in tensors.items() if name != "cascade.decay"}
        with pytest.raises(ConfigError, match=r"'cascade\.decay' is missing"):
            CascadeConfig.from_tensors(missing, [1, 3])
        with pytest.raises(ConfigError, match=r"expected shape \(3,\), found \(2,\)"):
            CascadeConfig.from_tensors(tensors, [1, 3, 5])
        broken = tensors | {"cascade.threshold": torch.tensor([1.0, math.nan])}
        with pytest.raises(ConfigError, match=r"layer 3: threshold must be .* found nan"):
            CascadeConfig.from_tensors(broken, [1, 3])


class TestSteps:
    def test_a_step_is_the_probe_then_the_rule(self, controller, probes):
        hidden = states(6)
        state, confidence, most = controller.start(6), np.zeros(6), 0.0
        for k, layer in enumerate(controller.config.layers):
            decision = controller.step(k, hidden, state)
            risk = probes.risk(k, hidden).detach().numpy()
            np.testing.assert_allclose(decision.risk, risk, rtol=1e-4, atol=1e-5)
            gain = np.clip((layer.threshold - risk) / layer.threshold, 0, 1)
            confidence = layer.decay * confidence + layer.weight * gain
            most = layer.decay * most + layer.weight
            np.testing.assert_allclose(decision.confidence, confidence / most, atol=1e-4)
            expected = decision.confidence >= np.float32(layer.exit_confidence)
            np.testing.assert_array_equal(decision.try_exit, expected)
            assert decision.tries == expected.sum()

    @settings(deadline=None)
    @given(rows=st.integers(1, 12), seed=st.integers(0, 1000))
    def test_a_row_is_judged_alike_in_any_company(self, controller, rows, seed):
        hidden = states(rows, seed)
        together = run(controller, hidden)
        for row in range(rows):
            alone = run(controller, hidden[row : row + 1])
            for one, all_rows in zip(alone, together, strict=True):
                assert one.tobytes() == all_rows[row : row + 1].tobytes()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves_are_judged_by_their_values(self, controller, dtype):
        hidden = states(7).to(dtype)
        for half, whole in zip(
            run(controller, hidden), run(controller, hidden.float()), strict=True
        ):
            np.testing.assert_array_equal(half, whole)

    def test_other_types_are_converted(self, controller):
        hidden = states(7)
        for wide, whole in zip(
            run(controller, hidden.double()), run(controller, hidden), strict=True
        ):
            np.testing.assert_array_equal(wide, whole)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_last_position_of_a_batch_needs_no_copy(self, controller, dtype):
        hidden = torch.randn(3, 5, WIDTH).to(dtype)
        last = hidden[:, -1]
        assert not last.is_contiguous()
        for found, expected in zip(
            run(controller, last), run(controller, last.contiguous()), strict=True
        ):
            np.testing.assert_array_equal(found, expected)

    def test_strided_and_tracked_states_are_read(self, controller):
        hidden = states(4)
        expected = run(controller, hidden)
        for other in (hidden.t().contiguous().t(), hidden.clone().requires_grad_()):
            for found, one in zip(run(controller, other), expected, strict=True):
                np.testing.assert_array_equal(found, one)

    def test_rows_that_left_keep_their_confidence(self, controller):
        hidden, state = states(4), controller.start(4)
        controller.step(0, hidden, state)
        before = state.confidence.copy()
        active = torch.tensor([True, False, True, False])
        decision = controller.step(1, hidden, state, active)
        gone = ~active.numpy()
        np.testing.assert_array_equal(state.confidence[gone], before[gone])
        assert (state.confidence[~gone] != before[~gone]).all()
        assert np.isnan(decision.risk[gone]).all()
        assert not decision.try_exit[gone].any()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_never_exits(self, probes, bad):
        eager = CascadeController(config(1e6, exit_confidence=0.0), [probes.native(0)])
        hidden = states(3)
        hidden[1, 5] = bad
        assert eager.step(0, hidden, eager.start(3)).try_exit.tolist() == [True, False, True]
        risk = torch.tensor([0.1, bad, 0.1])
        decision = eager.step_risk(0, risk, eager.start(3))
        assert decision.try_exit.tolist() == [True, False, True]
        assert decision.confidence[1] == 0

    def test_given_risks_decide_alike(self, controller):
        hidden = states(5)
        states_of, of_risks = controller.start(5), controller.start(5)
        for k in range(2):
            one = controller.step(k, hidden, states_of)
            for risk in (one.risk, torch.from_numpy(one.risk.astype(np.float64))):
                again = controller.start(5)
                again.confidence[:] = of_risks.confidence
                two = controller.step_risk(k, risk, again)
                np.testing.assert_array_equal(one.confidence, two.confidence)
                np.testing.assert_array_equal(one.try_exit, two.try_exit)
            of_risks = again

    def test_a_bar_above_one_turns_a_checkpoint_off(self):
        closed = CascadeController(config(1.0, exit_confidence=1.01))
        assert closed.step_risk(0, np.zeros(2, np.float32), closed.start(2)).tries == 0

    def test_threads_may_share_a_controller(self, controller):
        batches = [states(1 + seed % 5, seed) for seed in range(40)]
        expected = [run(controller, hidden) for hidden in batches]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda hidden: run(controller, hidden), batches))
        for one, two in zip(found, expected, strict=True):
            for first, second in zip(one, two, strict=True):
                np.testing.assert_array_equal(first, second)

    def test_misuse_is_named(self, controller, probes):
        state = controller.start(2)
        with pytest.raises(ConfigError, match="checkpoint 2: checkpoint 2 does not exist"):
            controller.step(2, states(2), state)
        with pytest.raises(ConfigError, match="has 40 elements, expected 48"):
            controller.step(0, states(2)[:, :40].contiguous(), state)
        with pytest.raises(ConfigError, match="confidence has 2 elements, expected 3"):
            controller.step(0, states(3), state)
        with pytest.raises(ConfigError, match=r"must be on the CPU, found meta.*step_risk"):
            controller.step(0, states(2).to("meta"), state)
        with pytest.raises(ConfigError, match="active has 3 elements, expected 2"):
            controller.step_risk(0, np.zeros(2, np.float32), state, np.ones(3, np.bool_))
        bare = CascadeController(config(1.0))
        with pytest.raises(ConfigError, match="built without probes"):
            bare.step(0, states(1), bare.start(1))
        with pytest.raises(ConfigError, match="probes has 1 elements, expected 2"):
            CascadeController(config(1.0, 1.0), [probes.native(0)])
        broken = replace(probes.native(0), out_bias=math.nan)
        with pytest.raises(ConfigError, match=r"out_bias\[0\] must be finite"):
            CascadeController(config(1.0), [broken])


class TestAim:
    @pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_the_rate_is_met_on_the_risks_it_was_aimed_at(self, rate, count):
        rng = np.random.default_rng(3)
        level = rng.gamma(2.0, 0.5, (2000, 1))
        risks = (level * rng.uniform(0.7, 1.3, (2000, count))).astype(np.float32)
        aimed = aim_thresholds(config(*[0.0] * count), risks, rate)
        controller, state = CascadeController(aimed), None
        state, active = controller.start(2000), np.ones(2000, np.bool_)
        for k in range(count):
            risk = np.ascontiguousarray(risks[:, k])
            active &= ~controller.step_risk(k, risk, state, active).try_exit
        assert 1 - active.mean() == pytest.approx(rate, abs=0.01)

    def test_only_thresholds_change(self):
        before = config(1.0, 1.0, weight=0.5, decay=0.7, exit_confidence=0.4, min_probability=0.2)
        risks = np.random.default_rng(0).random((50, 2), dtype=np.float32)
        after = aim_thresholds(replace(before, target_exit_rate=0.5), risks)
        assert after.target_exit_rate == 0.5
        same = [replace(layer, threshold=1.0) for layer in after.layers]
        assert tuple(same) == before.layers

    def test_risks_that_are_not_finite_do_not_count(self):
        risks = np.array([[np.nan], [0.2], [np.inf], [0.4]], np.float32)
        aimed = aim_thresholds(config(1.0), risks, 0.5)
        controller = CascadeController(aimed)
        tried = controller.step_risk(0, risks[:, 0].copy(), controller.start(4)).try_exit
        assert tried.tolist() == [False, True, False, True]

    def test_a_checkpoint_that_nobody_can_leave_at_keeps_its_threshold(self):
        risks = np.full((4, 1), np.nan, np.float32)
        assert aim_thresholds(config(0.6), risks, 0.5).layers[0].threshold == 0.6

    def test_misuse_is_named(self):
        risks = np.zeros((3, 1), np.float32)
        with pytest.raises(ConfigError, match="target_exit_rate is not set"):
            aim_thresholds(config(1.0), risks)
        for bad in (risks[:0], risks[:, 0], np.zeros((3, 2), np.float32)):
            with pytest.raises(ConfigError, match=r"risks must be \[tokens, 1\]"):
                aim_thresholds(config(1.0), bad, 0.5)
