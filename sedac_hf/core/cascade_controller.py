"""The cascade: confidence that grows over checkpoints until a token tries to leave.

``conf_k = clamp((tau_k - risk_k) / tau_k, 0, 1)``, ``C_k = gamma_k C_{k-1} + w_k conf_k``; a row
tries to exit when ``C_k`` reaches the share ``exit_confidence_k`` of what it would be had every
risk been 0. A risk that is NaN or infinite never exits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf import _core
from sedac_hf.core.attention_spread import Spread
from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.core.cascade_state import CascadeState, StepContext, begin_state
from sedac_hf.core.confidence_fusion import adaptive_confidence_decay
from sedac_hf.core.estimators import Observation
from sedac_hf.core.fused_gates import FusedGates, Seen
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.states_in_place import in_place, native_risk
from sedac_hf.core.token_routing import TOKEN_CLASSES
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.probe_inference import PackedProbe, ProbeManager

__all__ = [
    "CascadeConfig",
    "CascadeController",
    "CascadeState",
    "CheckpointDecision",
    "LayerConfig",
    "StepContext",
]

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_Call = Callable[[_core.Cascade, Mask | None, tuple[FloatArray, ...]], tuple[Any, ...]]


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

    def __init__(
        self,
        config: CascadeConfig,
        probes: Sequence[PackedProbe] | None = None,
        *,
        gates: GateParts | None = None,
        modules: ProbeManager | None = None,
    ) -> None:
        """Hand rules and probes to the Rust core.

        Args:
            config: The rules.
            probes: One packed probe per checkpoint; without them only `step_risk` works.
            gates: Fusion weights and classes of tokens, where the rules use them.
            modules: The same probes as modules; needed where the rules fuse evidence.

        Raises:
            ConfigError: If the number of probes is another than that of checkpoints, a probe
                is malformed, or the rules need a part that is not there.
        """
        self.config = config
        self.strategy = config.exit_strategy
        parts = gates or GateParts()
        parts.check(config)
        self._token_classes = parts.token_classes if config.routes else None
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
            thresholds = config.array("threshold")
            self._cascade = self._core_of(thresholds, packed)
            self._routed = [
                self._core_of(np.array([rule.threshold_of(each) for each in config.layers]), packed)
                for rule in config.routes
            ]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the cascade cannot be built: {error}.") from error
        self._bars = np.array(
            [[rule.least_of(each) for each in config.layers] for rule in config.routes], np.float32
        )
        self._fused: FusedGates | None = None
        if packed and parts.fusion is not None and config.fusion != "none":
            if modules is None:
                raise ConfigError("rules that fuse evidence need the probes as modules too.")
            native = [native_risk(probe) for probe in packed]
            self._fused = FusedGates(parts.fusion, config.fusion, modules, native)

    def _core_of(self, thresholds: npt.NDArray[Any], probes: list[_core.Probe]) -> _core.Cascade:
        names = ("weight", "decay", "exit_confidence")
        weight, decay, exit_confidence = (self.config.array(name) for name in names)
        return _core.Cascade(thresholds.astype(np.float32), weight, decay, exit_confidence, probes)

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints."""
        return self._cascade.num_checkpoints

    @property
    def fuses(self) -> bool:
        """Whether the risk is fused from more than the probe's."""
        return self._fused is not None

    def start(self, rows: int, context: StepContext | None = None) -> CascadeState:
        """The state before the first checkpoint.

        Args:
            rows: Number of rows.
            context: What is known of them beside their states.
        """
        adapts = self.config.adaptive_decay is not None
        return begin_state(rows, context or StepContext(), self._token_classes, adapts)

    def step(
        self,
        k: int,
        hidden: Tensor,
        state: CascadeState,
        active: Mask | Tensor | None = None,
        spread: Tensor | None = None,
    ) -> CheckpointDecision:
        """One checkpoint in one call: probe, accumulate, decide.

        float32, bfloat16 and float16 are read in place, other types are converted.

        Args:
            k: Which checkpoint, from 0.
            hidden: States ``[rows, width]`` on the CPU; on any device where evidence is fused. On
                other devices, compute the risks there and give them to `step_risk`.
            state: Updated in place for the active rows.
            active: Rows that have not left, ``[rows]``; all by default.
            spread: How evenly the rows attend in the checkpoint's layer, ``[rows]``; None if that
                is not known.

        Returns:
            The decision. A row's part of it does not depend on the other rows.

        Raises:
            ConfigError: If there are no probes, or a shape or device is another.
        """
        mask = _mask(active)
        if self._fused is not None:
            state.seen = Seen(Observation(hidden, state.before, spread=spread))
            state.before = hidden
            risk = self._fused.risk(k, state.seen)
            if mask is not None:
                risk = np.where(mask, risk, np.float32(np.nan))
            return self.step_risk(k, risk, state, mask)
        array, dtype = in_place(hidden)
        unknown = np.full(len(array), np.nan, np.float32)
        return self._decided(
            k, state, mask, unknown,
            lambda core, rows, decays: core.step(
                k, array, dtype, state.confidence, rows, *decays
            ),
        )  # fmt: skip

    def risks(
        self,
        k: int,
        hidden: Tensor,
        before: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> FloatArray:
        """The risks that `step` decides by, and no decision.

        Args:
            k: Which checkpoint, from 0.
            hidden: States ``[rows, width]``, as for `step`.
            before: States of the same rows at the checkpoint before, or embeddings.
            spread: How evenly the rows attend, as for `step`.

        Returns:
            Risks ``[rows]``; NaN where they need something that is not known.
        """
        if self._fused is not None:
            return self._fused.risk(k, Seen(Observation(hidden, before, spread=spread)))
        array, dtype = in_place(hidden)
        found: FloatArray = self._cascade.step(k, array, dtype, np.zeros(len(array), np.float32))[0]
        return found

    def needs_before(self, k: int) -> bool:
        """Whether checkpoint `k` looks at the states of the checkpoint before."""
        return self._fused is not None and self._fused.needs_before(k)

    def needs_attention(self, k: int) -> bool:
        """Whether checkpoint `k` looks at how evenly its layer attends."""
        return self._fused is not None and self._fused.needs_attention(k)

    @property
    def attentive(self) -> tuple[int, ...]:
        """Checkpoints that look at how evenly their layers attend."""
        return tuple(k for k in range(self.num_checkpoints) if self.needs_attention(k))

    def spread_at(self, k: int) -> Spread | None:
        """What the layer of checkpoint `k` is to fill in; None where nobody looks at it."""
        return Spread() if self.needs_attention(k) else None

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
        given = risk
        return self._decided(
            k, state, _mask(active), given,
            lambda core, rows, decays: core.step_risk(k, given, state.confidence, rows, *decays),
        )  # fmt: skip

    def _decided(
        self, k: int, state: CascadeState, active: Mask | None, risk: FloatArray, call: _Call
    ) -> CheckpointDecision:
        """Ask the core, class by class where classes have rules of their own."""
        decays: tuple[FloatArray, ...] = ()
        if state.uncertainty is not None and state.most is not None:
            base = self.config.layers[k].decay if 0 <= k < self.num_checkpoints else 0.0
            gamma = adaptive_confidence_decay(base, state.uncertainty, state.bonus)
            decays = (gamma, state.most)
        try:
            if state.classes is None:
                return CheckpointDecision(*call(self._cascade, active, decays))
            rows = np.ones(len(risk), np.bool_) if active is None else active
            found = _nothing(risk)
            for kind in np.unique(state.classes[rows]).tolist():
                # A token that is not known has no rules, so it does not leave.
                if kind >= len(TOKEN_CLASSES):
                    continue
                here = rows & (state.classes == kind)
                some = CheckpointDecision(*call(self._routed[kind], here, decays))
                found = _merged(found, some, here)
            return found
        except (IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"checkpoint {k}: {error}.") from error

    def least_probability(self, k: int, state: CascadeState) -> FloatArray | None:
        """What the exit's own probability must reach at checkpoint `k`.

        Args:
            k: Which checkpoint, from 0.
            state: What is known of the rows.

        Returns:
            Least probabilities ``[rows]``; None where none is asked for.
        """
        least = self.config.layers[k].min_probability
        if least <= 0:
            return None
        if state.classes is None:
            return np.full(len(state.confidence), least, np.float32)
        # A class that is not known has no rules; its rows do not try, so any bar will do.
        known = np.minimum(state.classes, len(TOKEN_CLASSES) - 1)
        return np.asarray(self._bars[known, k], np.float32)

    def sureness(self, k: int, probability: FloatArray, state: CascadeState) -> FloatArray:
        """What is held against the least probability: the exit's own, or what it is fused to.

        Args:
            k: The checkpoint that was asked last.
            probability: The exit's own probability, ``[rows]``; NaN where it was not asked.
            state: What the checkpoint showed of the rows.

        Returns:
            ``[rows]``; NaN where it is not known.
        """
        if self._fused is None or state.seen is None:
            return probability
        return self._fused.sureness(k, state.seen, probability)


def _nothing(risk: FloatArray) -> CheckpointDecision:
    """A decision in which nobody was asked."""
    rows = len(risk)
    return CheckpointDecision(
        risk.copy(), np.full(rows, np.nan, np.float32), np.zeros(rows, np.bool_), 0
    )


def _merged(whole: CheckpointDecision, some: CheckpointDecision, here: Mask) -> CheckpointDecision:
    """A decision with that of some rows put in."""
    return CheckpointDecision(
        np.where(here, some.risk, whole.risk),
        np.where(here, some.confidence, whole.confidence),
        np.where(here, some.try_exit, whole.try_exit),
        whole.tries + some.tries,
    )


def _mask(active: Mask | Tensor | None) -> Mask | None:
    return active.numpy(force=True) if isinstance(active, Tensor) else active
