"""In which mode a call runs, by which rules, and what holds inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformers.utils import logging

from sedac_hf.calibration_methods import CalibrationMethods
from sedac_hf.config import MODES, SedacConfig
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.cascade_controller import CascadeConfig, CascadeController
from sedac_hf.core.channel_order import ChannelOrder
from sedac_hf.core.exit_heads import ExitHead
from sedac_hf.core.exit_parts import Assembly, check_cascade
from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.core.session import ExitSession
from sedac_hf.errors import ModeError
from sedac_hf.metrics.attachment import Measured

if TYPE_CHECKING:
    from sedac_hf.core.observers import ExitWatch

__all__ = ["ModeControl"]

logger = logging.get_logger(__name__)

# Per thread of control: models whose exits are disabled, those that run on their base's modules,
# and cascades standing in for their own.
_DISABLED: ContextVar[frozenset[int]] = ContextVar("sedac_disabled", default=frozenset())
_ON_MODULES: ContextVar[frozenset[int]] = ContextVar("sedac_on_modules", default=frozenset())
_REPLACED: ContextVar[Mapping[int, CascadeConfig] | None] = ContextVar(
    "sedac_cascade", default=None
)


class ModeControl(Measured, CalibrationMethods):
    """Modes, cascades and the sessions that follow from them."""

    # Transformers evaluates these annotations, so their names are imported for real.
    config: SedacConfig
    cascade: CascadeConfig | None
    exit_heads: nn.ModuleList
    probes: ProbeManager
    draft_vocabulary: Tensor | None
    shell: BaseShell
    exit_stats: ExitStats
    channel_order: ChannelOrder | None
    gates: GateParts
    _assembly: Assembly | None
    refused_modes: dict[str, str]
    exits_off_reason: str | None

    @property
    def assembly(self) -> Assembly:
        """The parts of exits as the loop works with them."""
        if self._assembly is None:
            heads = cast("list[ExitHead]", list(self.exit_heads))
            self._assembly = Assembly(
                self.shell,
                heads,
                self.probes,
                self.draft_vocabulary,
                self.channel_order,
                self.gates,
            )
        return self._assembly

    def set_gates(self, gates: GateParts) -> None:
        """Take other fusion weights and classes of tokens, which rules may use.

        Args:
            gates: The parts.

        Raises:
            ConfigError: If the rules in force need parts that are not among them.
        """
        if self.cascade is not None:
            gates.check(self.cascade)
        self.gates = gates
        self._assembly = None

    def set_cascade(self, cascade: CascadeConfig | None) -> None:
        """Take other rules by which tokens leave; in certified mode they act from now on.

        Args:
            cascade: The rules; None turns exits off.

        Raises:
            ConfigError: If their checkpoints are not those of the model.
        """
        if cascade is not None:
            check_cascade(cascade, self.config.checkpoint_specs())
            self.gates.check(cascade)
        if self.calibration is not None and self.calibration.chosen != cascade:
            logger.warning("Online calibration was for other rules and is detached; attach anew.")
            self.detach_calibration()
        if cascade is not None:
            self.config.strategy = cascade.strategy
        self.cascade = cascade
        self.exits_off_reason = None

    def set_channel_order(self, order: ChannelOrder | None, *, check: bool = True) -> None:
        """Take the order in which soft exits drop the MLPs' channels.

        Args:
            order: See `sedac_hf.calibration.channel_order`; None for none.
            check: Whether to refuse it now if it does not fit; else soft exits do when they are
                used, and nothing else minds.

        Raises:
            ConfigError: If it was made for other MLPs.
            UnsupportedModelError: If the base's MLPs cannot be narrowed.
        """
        if order is not None and check:
            order.check_fits(self.shell)
        self.channel_order = order
        self._assembly = None

    @contextmanager
    def cascade_replaced(self, cascade: CascadeConfig | None) -> Iterator[None]:
        """Use other rules inside the block, in this thread only.

        Args:
            cascade: The rules; None changes nothing.
        """
        if cascade is not None:
            check_cascade(cascade, self.config.checkpoint_specs())
            self.gates.check(cascade)
        replaced = {} if cascade is None else {id(self): cascade}
        token = _REPLACED.set({**(_REPLACED.get() or {}), **replaced})
        try:
            yield
        finally:
            _REPLACED.reset(token)

    @contextmanager
    def exits_disabled(self) -> Iterator[None]:
        """Inside the block, in this thread, the model is its base."""
        token = _DISABLED.set(_DISABLED.get() | {id(self)})
        try:
            yield
        finally:
            _DISABLED.reset(token)

    @contextmanager
    def native_disabled(self) -> Iterator[None]:
        """Inside the block, in this thread, calls run on the base's own modules."""
        token = _ON_MODULES.set(_ON_MODULES.get() | {id(self)})
        try:
            yield
        finally:
            _ON_MODULES.reset(token)

    def _native_is_disabled(self) -> bool:
        return id(self) in _ON_MODULES.get()

    def _mode(self, asked: str | None) -> str:
        """The mode that a call runs in."""
        if id(self) in _DISABLED.get():
            return "off"
        mode = self.config.mode if asked is None else asked
        if mode not in MODES:
            raise ModeError(f"sedac_mode must be one of {MODES}, found {mode!r}.")
        if mode in self.refused_modes:
            raise ModeError(f"Mode {mode!r} is refused: {self.refused_modes[mode]}")
        if mode == "certified" and self._cascade() is None:
            logger.warning_once(
                "This model has no certified exits, so nothing leaves early: it runs plain. Fit "
                "exits with sedac_hf.fit, or ask for sedac_mode='plain' to silence this."
            )
            return "plain"
        if mode == "certified" and self.exits_off_reason and self._cascade() is self.cascade:
            logger.warning_once(
                f"Exits stay off in certified mode, so it runs plain: {self.exits_off_reason}"
            )
            return "plain"
        return mode

    def _cascade(self) -> CascadeConfig | None:
        if not len(self.exit_heads):
            return None
        return (_REPLACED.get() or {}).get(id(self), self.cascade)

    def _session(self, mode: str, prepare: bool = True) -> ExitSession:
        if prepare:
            self.assembly.prepare()
        controller: CascadeController | None = None
        cascade = self._cascade()
        if mode == "certified" and cascade is not None:
            controller = self.assembly.controller(cascade)
            if cascade.is_soft:
                self.assembly.prepare_narrow()
        soft = controller is not None and controller.config.is_soft
        settles = self.config.kv_mode == "settle" and not soft
        acting = None if controller is None else cascade
        session = ExitSession(
            owner=self, mode=mode, cascade=controller, settles=settles,
            meter=self._meter(mode, acting),
        )  # fmt: skip
        session.watch = self._watch(mode)
        if session.watch is not None:
            session.observers = (*session.observers, session.watch)
            if controller is not None:
                session.cascade = session.watch.cascade
        return session

    def _watch(self, mode: str) -> ExitWatch | None:
        """What online calibration sees a call through; None where it has no part in it."""
        calibration = self.calibration
        if calibration is None or mode not in ("certified", "exact"):
            return None
        if self._cascade() is not self.cascade or (self.cascade and self.cascade.is_soft):
            # Other rules stand in for those that are watched, or no exit head is asked.
            return None
        from sedac_hf.calibration.call_watch import CallWatch

        return CallWatch(calibration, self.assembly.controller, follows=mode == "certified")
