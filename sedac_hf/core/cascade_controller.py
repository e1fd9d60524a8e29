"""The cascade: confidence that grows over checkpoints until a token tries to leave.

``conf_k = clamp((tau_k - risk_k) / tau_k, 0, 1)``, ``C_k = gamma_k C_{k-1} + w_k conf_k``; a row
tries to exit when ``C_k`` reaches the share ``exit_confidence_k`` of what it would be had every
risk been 0. A risk that is NaN or infinite never exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf import _core
from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.probe_inference import PackedProbe

__all__ = [
    "CascadeConfig",
    "CascadeController",
    "CascadeState",
    "CheckpointDecision",
    "LayerConfig",
    "aim_thresholds",
]

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_DTYPES: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass
class CascadeState:
    """What the cascade has accumulated in one decode step.

    Attributes:
        confidence: Accumulated confidence, not normalised, ``[rows]``.
    """

    confidence: FloatArray


class CheckpointDecision(NamedTuple):
    """What one checkpoint says of every row, on the host.

    Attributes:
        risk: ``[rows]``; NaN for rows that were not active.
        confidence: Normalised to [0, 1], ``[rows]``; NaN for rows that were not active.
        try_exit: Whether the row tries to exit, ``[rows]``.
        tries: How many rows do.
    """

    risk: FloatArray
    confidence: FloatArray
    try_exit: Mask
    tries: int


class CascadeController:
    """Decides at each checkpoint who tries to exit. Immutable, so threads may share it.

    Attributes:
        config: The rules.
        strategy: What an exit skips.
    """

    def __init__(self, config: CascadeConfig, probes: Sequence[PackedProbe] | None = None) -> None:
        """Hand rules and probes to the Rust core.

        Args:
            config: The rules.
            probes: One packed probe per checkpoint; without them only `step_risk` works.

        Raises:
            ConfigError: If the number of probes is another than that of checkpoints, or a probe
                is malformed.
        """
        self.config = config
        self.strategy = config.exit_strategy
        try:
            packed = [
                _core.Probe(
                    probe.project,
                    probe.norm_weight,
                    probe.norm_bias,
                    probe.epsilon,
                    probe.out_weight,
                    probe.out_bias,
                )
                for probe in probes or ()
            ]
            self._cascade = _core.Cascade(
                config.array("threshold"),
                config.array("weight"),
                config.array("decay"),
                config.array("exit_confidence"),
                packed,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the cascade cannot be built: {error}.") from error

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints."""
        return self._cascade.num_checkpoints

    def start(self, rows: int) -> CascadeState:
        """The state before the first checkpoint, for `rows` rows."""
        return CascadeState(np.zeros(rows, np.float32))

    def step(
        self, k: int, hidden: Tensor, state: CascadeState, active: Mask | Tensor | None = None
    ) -> CheckpointDecision:
        """One checkpoint in one call: probe, accumulate, decide.

        float32, bfloat16 and float16 are read in place, other types are converted.

        Args:
            k: Which checkpoint, from 0.
            hidden: States ``[rows, width]`` on the CPU. On other devices, compute the risks there
                and give them to `step_risk`.
            state: Updated in place for the active rows.
            active: Rows that have not left, ``[rows]``; all by default.

        Returns:
            The decision. A row's part of it does not depend on the other rows.

        Raises:
            ConfigError: If there are no probes, or a shape or device is another.
        """
        array, dtype = _in_place(hidden)
        try:
            decision = self._cascade.step(k, array, dtype, state.confidence, _mask(active))
        except (IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"checkpoint {k}: {error}.") from error
        return CheckpointDecision(*decision)

    def step_risk(
        self,
        k: int,
        risk: FloatArray | Tensor,
        state: CascadeState,
        active: Mask | Tensor | None = None,
    ) -> CheckpointDecision:
        """The same from risks that are already known, for states on other devices.

        Args:
            k: Which checkpoint, from 0.
            risk: Risks ``[rows]``, on any device: one read by the host.
            state: Updated in place for the active rows.
            active: Rows that have not left, ``[rows]``; all by default.

        Returns:
            The decision, with the risks of rows that are not active as they were given.

        Raises:
            ConfigError: If a shape is another.
        """
        if isinstance(risk, Tensor):
            risk = risk.detach().to("cpu", torch.float32).contiguous().numpy()
        try:
            decision = self._cascade.step_risk(k, risk, state.confidence, _mask(active))
        except (IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"checkpoint {k}: {error}.") from error
        return CheckpointDecision(*decision)


def _in_place(hidden: Tensor) -> tuple[npt.NDArray[Any], str]:
    """A tensor's memory as an array that the core reads, and what it holds."""
    if not hidden.is_cpu:
        raise ConfigError(
            f"states must be on the CPU, found {hidden.device}: compute the risks there and use "
            "step_risk."
        )
    if hidden.requires_grad:
        hidden = hidden.detach()
    dtype = _DTYPES.get(hidden.dtype)
    if dtype is None:
        return hidden.float().numpy(), "f32"
    if not hidden.is_contiguous() and hidden.dim() == 2 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    # NumPy has no bfloat16; its bits travel as integers.
    return (hidden.view(torch.uint16) if dtype == "bf16" else hidden).numpy(), dtype


def _mask(active: Mask | Tensor | None) -> Mask | None:
    return active.numpy(force=True) if isinstance(active, Tensor) else active


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
        so_far = CascadeController(replace(config, layers=layers))
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
