"""How the tests of online calibration watch: quickly, and by limits of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sedac_hf.calibration import DualMetricCalibration
from sedac_hf.modeling import SedacForCausalLM

QUICK: dict[str, Any] = {"memory": 256, "patience": 128, "full_depth_share": 0.2}
TOKENS = 60
Write = Callable[..., torch.Tensor]


def limits(ppl_tolerance: float = 0.06, **values: float) -> DualMetricCalibration:
    return DualMetricCalibration(ppl_tolerance=ppl_tolerance, **values)


def share(model: SedacForCausalLM) -> float:
    """Share of exits since the last time."""
    found = model.exit_stats.exit_share
    model.exit_stats.reset()
    return found
