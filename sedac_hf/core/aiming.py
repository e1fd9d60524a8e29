"""Thresholds without calibration: the quantiles of observed risks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.core.cascade_controller import CascadeController
from sedac_hf.core.cascade_state import CascadeState
from sedac_hf.errors import ConfigError

__all__ = ["aim_thresholds"]

FloatArray = npt.NDArray[np.float32]


def aim_thresholds(
    config: CascadeConfig, risks: FloatArray, target_exit_rate: float | None = None
) -> CascadeConfig:
    """Thresholds at the quantiles of observed risks, for use without calibration.

    Every checkpoint is aimed at the same share of all tokens. Exits that `min_probability` holds
    back come off the rate.

    Args:
        config: The rules, whose thresholds are replaced.
        risks: Risk of recent tokens at every checkpoint, ``[tokens, checkpoints]``.
        target_exit_rate: Share of the tokens that are to leave; that of `config` by default.

    Returns:
        A configuration with other thresholds. No promise on quality goes with it.

    Raises:
        ConfigError: If there are no risks, their shape is another, or there is no rate.
    """
    if target_exit_rate is not None:
        config = replace(config, target_exit_rate=target_exit_rate)
    if config.target_exit_rate is None:
        raise ConfigError("target_exit_rate is not set: give one.")
    count = len(config.layers)
    if risks.ndim != 2 or len(risks) == 0 or risks.shape[1] != count:
        raise ConfigError(
            f"risks must be [tokens, {count}] with at least one token, found shape {risks.shape}."
        )
    leaving = max(1, round(len(risks) * config.target_exit_rate / count))
    risks = risks.astype(np.float32)
    layers: list[LayerConfig] = []
    state = CascadeState(np.zeros(len(risks), np.float32))
    active = np.ones(len(risks), np.bool_)
    most = 0.0
    for k, layer in enumerate(config.layers):
        most = layer.decay * most + layer.weight
        risk = np.ascontiguousarray(risks[:, k])
        needed = _needed_thresholds(layer, most, np.where(active, risk, np.nan), state)
        if len(needed):
            # A little more than exact, so that rounding does not hold the last one back.
            threshold = float(needed[min(leaving, len(needed)) - 1]) * (1 + 1e-5)
            layer = replace(layer, threshold=max(threshold, 0.0))
        layers.append(layer)
        # Plain rules: risks are given as they are, and nothing is known of the tokens.
        so_far = CascadeController(CascadeConfig(layers))
        active &= ~so_far.step_risk(k, risk, state, active).try_exit
    return replace(config, layers=layers)


def _needed_thresholds(
    layer: LayerConfig, most: float, risk: FloatArray, state: CascadeState
) -> npt.NDArray[np.float64]:
    """The least threshold at which each row would try, ascending, of the rows that can."""
    if layer.weight == 0:
        return np.empty(0)
    before = layer.decay * state.confidence.astype(np.float64)
    missing = np.maximum((layer.exit_confidence * most - before) / layer.weight, 0)
    can = np.isfinite(risk) & (missing < 1)
    return np.sort(risk[can] / (1 - missing[can]))
