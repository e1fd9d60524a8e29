"""How much each strategy skips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sedac_hf.core import AdaptiveSoftExit, CascadeConfig, CascadeController, LayerConfig, SoftExit
from sedac_hf.core.exit_strategy import (
    HardExit,
    make_strategy,
    soft_exit_mlp_scaling,
    strategy_name,
)
from sedac_hf.errors import ConfigError

RATIOS = np.linspace(-0.5, 1.5, 41)


def test_the_skipped_share_is_the_logistic_function_of_the_ratio() -> None:
    for k in (0.0, 1.5, 10.0, 500.0):
        expected = [1 / (1 + math.exp(-k * (ratio - 0.5))) for ratio in RATIOS]
        np.testing.assert_allclose(soft_exit_mlp_scaling(RATIOS, k), expected, rtol=1e-9, atol=1e-9)
        tensor = soft_exit_mlp_scaling(torch.from_numpy(RATIOS), k)
        torch.testing.assert_close(tensor, torch.tensor(expected, dtype=torch.float64))
    assert soft_exit_mlp_scaling(0.5) == 0.5
    assert isinstance(soft_exit_mlp_scaling(0.7), float)


def test_nothing_is_skipped_where_confidence_is_not_a_number() -> None:
    nan = float("nan")
    assert soft_exit_mlp_scaling(nan) == 0.0
    assert soft_exit_mlp_scaling(np.array([nan, 0.5])).tolist() == [0.0, 0.5]
    assert soft_exit_mlp_scaling(torch.tensor([nan, 0.5])).tolist() == [0.0, 0.5]
    for strategy in (HardExit(), SoftExit(), AdaptiveSoftExit()):
        assert strategy.skipped(np.array([nan])).tolist() == [0.0]
    for soft in (SoftExit(), AdaptiveSoftExit()):
        assert soft.kept(np.array([nan]), 1, 6).tolist() == [[8]] * 4


@pytest.mark.parametrize("k", [-1.0, float("nan"), float("inf"), True, "steep"])
def test_a_steepness_without_meaning_is_refused(k: float) -> None:
    with pytest.raises(ConfigError, match="steepness"):
        soft_exit_mlp_scaling(0.5, k)
    with pytest.raises(ConfigError, match="steepness"):
        CascadeConfig([LayerConfig(1)], strategy="soft", steepness=k)


def test_soft_keeps_equally_much_in_every_layer_of_the_tail() -> None:
    found = SoftExit(10.0).kept(RATIOS, 2, 8)
    assert found.shape == (5, len(RATIOS))
    assert (found == found[0]).all()
    assert found.min() == 1
    assert found.max() == 8
    # More confidence never keeps more.
    assert (np.diff(found[0].astype(int)) <= 0).all()
    kept_share = 1 - soft_exit_mlp_scaling(RATIOS, 10.0)
    assert (found[0] / 8 >= np.minimum(kept_share, 1) - 1e-6).all()
    assert (found[0] / 8 <= kept_share + 1 / 8).all()


def test_exact_eighths_stay_exact() -> None:
    assert SoftExit(0.0).kept(np.array([0.3, 0.9]), 0, 3).tolist() == [[4, 4], [4, 4]]


def test_adaptive_keeps_more_near_the_checkpoint_and_as_much_on_average() -> None:
    confidence = np.array([0.5, 0.4, 0.3])
    found = AdaptiveSoftExit(4.0).kept(confidence, 3, 20).astype(int)
    assert (np.diff(found, axis=0) <= 0).all()
    assert (found[0] == 8).all()
    assert (found[0] > found[-1]).all()
    even = SoftExit(4.0).kept(confidence, 3, 20)
    # Rounding up gives at most an eighth.
    assert np.abs(found.mean(0) - even.mean(0)).max() <= 1


def test_strategies_have_names_and_both_spellings() -> None:
    assert strategy_name("adaptive_soft") == "adaptive-soft"
    assert make_strategy("hard") == HardExit()
    assert make_strategy("soft", 3.0) == SoftExit(3.0)
    assert make_strategy("adaptive_soft", 3.0) == AdaptiveSoftExit(3.0)
    for wrong in ("hopeful", None, 3):
        with pytest.raises(ConfigError, match="strategy must be one of"):
            strategy_name(wrong)


def test_a_controller_of_three_layers_says_how_much_a_soft_exit_skips() -> None:
    layers = [LayerConfig(7), LayerConfig(14), LayerConfig(21)]
    controller = CascadeController(CascadeConfig(layers, strategy="soft"))
    state = controller.start(2)
    first = controller.step_risk(0, np.array([0.05, np.nan], np.float32), state)
    assert first.try_exit.tolist() == [True, False]
    skipped = controller.strategy.skipped(first.confidence)
    assert 0.9 < skipped[0] <= 1
    assert skipped[1] < 0.01


def test_soft_rules_survive_being_stored() -> None:
    for strategy in ("soft", "adaptive_soft"):
        rules = CascadeConfig([LayerConfig(1, 2.0, decay=0.5)], strategy=strategy, steepness=4.0)
        found = CascadeConfig.from_tensors(rules.to_tensors(), [1], strategy=rules.strategy)
        assert found == rules
    assert "cascade.steepness" not in CascadeConfig([LayerConfig(1, 2.0)]).to_tensors()
