"""Loops with soft exits: every layer runs, sure tokens on fewer channels from a checkpoint on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.exit_step import checkpoint_decision
from sedac_hf.core.exit_strategy import SoftExit
from sedac_hf.core.narrow_tail import KeptChannels
from sedac_hf.core.session import StepRecord
from sedac_hf.core.stepwise import empty_trace

if TYPE_CHECKING:
    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.base_shell import LayerCall
    from sedac_hf.core.cascade_controller import CascadeController
    from sedac_hf.core.decoder_loop import ExitParts, LayerPass
    from sedac_hf.core.session import ExitSession

__all__ = ["SoftLoop", "SoftSimulation", "SoftStep"]

Mask = npt.NDArray[np.bool_]


class SoftStep:
    """Who has become sure in one step, and how much of the later MLPs each runs.

    The tokens are those of a decode step, `[rows]`, or all positions of sequences, `[rows, seq]`.
    A token that has become sure at one checkpoint is not asked at later ones.

    Attributes:
        kept: What each token runs.
        record: What was decided.
    """

    def __init__(
        self, parts: ExitParts, cascade: CascadeController, record: StepRecord, active: Mask
    ) -> None:
        """Begin a step.

        Args:
            parts: What exits are made of; of heads only the places count.
            cascade: Decides who is sure; its strategy is a soft one.
            record: Full depth for every token; filled in.
            active: Tokens that are asked, in their shape.
        """
        self._parts = parts
        self._cascade = cascade
        self._strategy = cast(SoftExit, cascade.strategy)
        self._active = active.copy()
        self._state = cascade.start(active.size)
        self.record = record
        self.kept = KeptChannels(parts.shell.num_layers, active.shape)
        self._soft = np.full(active.shape, -1, np.int64)

    def spread_at(self, k: int) -> Spread | None:
        """What the layer of checkpoint `k` is to fill in; None where nobody looks at it."""
        return self._cascade.spread_at(k) if self._active.any() else None

    def ask(self, k: int, hidden: Tensor, spread: Tensor | None = None) -> None:
        """Ask the cascade about checkpoint `k`.

        Args:
            k: Index of the checkpoint.
            hidden: States there, `[rows, seq, width]`.
            spread: How evenly the tokens attend in its layer, `[rows * seq]`, where `spread_at`
                asks.
        """
        if not self._active.any():
            return
        shape = self._active.shape
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = checkpoint_decision(
            self._parts, self._cascade, k, flat, self._state, self._active.reshape(-1), spread
        )
        record = self.record
        record.risks[..., k] = found.risk.reshape(shape)
        record.confidences[..., k] = found.confidence.reshape(shape)
        record.tries[..., k] = sure = found.try_exit.reshape(shape)
        if sure.any():
            layer_idx = self._parts.heads[k].layer_idx
            self.kept.narrow(self._strategy, layer_idx, sure, record.confidences[..., k])
            self._soft[sure] = k
            self._active &= ~sure

    def finish(self) -> StepRecord:
        """The record, completed."""
        self.record.soft_exits = self._soft
        self.record.kept = self.kept.share
        return self.record


def _through(parts: ExitParts, step: SoftStep, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
    """All layers, the cascade being asked at each checkpoint."""
    at, kept, passes = 0, step.kept, cast("LayerPass", parts.passes)
    for k, head in enumerate(parts.heads):
        stop, spread = head.layer_idx + 1, step.spread_at(k)
        hidden = passes.run(hidden, calls, at, stop, kept=kept, spread=spread)
        step.ask(k, hidden, None if spread is None else spread.flat)
        at = stop
    return passes.run(hidden, calls, at, len(calls), kept=kept)


class SoftLoop:
    """One forward of generation; exit heads are left out, their K/V included."""

    def __init__(self, parts: ExitParts, session: ExitSession) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            session: The call this forward belongs to; its cascade is soft.
        """
        self._parts = parts
        self._session = session

    def __call__(self, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """Run the layers.

        Args:
            hidden: Embeddings `[rows, seq, width]`.
            calls: One recorded call per layer.

        Returns:
            States for the base's final norm, same shape.
        """
        parts, session = self._parts, self._session
        session.pending = None
        cache: Any = parts.shell.cache_of(calls[0])
        prompt = hidden.shape[1] > 1 or cache is None or int(cache.get_seq_length()) == 0
        if prompt or session.cascade is None:
            return parts.passes.run(hidden, calls, 0, len(calls))
        rows = hidden.shape[0]
        record = StepRecord.full_depth(rows, parts.shell.num_layers, len(parts.heads))
        step = SoftStep(parts, session.cascade, record, np.ones(rows, np.bool_))
        hidden = _through(parts, step, hidden, calls)
        session.pending = step.finish()
        return hidden


class SoftSimulation:
    """Whole sequences in which every eligible position follows the rule of decoding.

    Each layer is run once over all positions, each with as many channels as it keeps, so that later
    ones see the K/V of narrower layers.

    Attributes:
        trace: What each position did; arrays `[rows, seq]` and `[rows, seq, checkpoints]`.
    """

    def __init__(self, parts: ExitParts, cascade: CascadeController, eligible: Mask) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            cascade: Decides who is sure.
            eligible: Positions that may leave, `[rows, seq]`.
        """
        self._parts = parts
        self._step = SoftStep(parts, cascade, empty_trace(parts, *eligible.shape), eligible)
        self.trace = self._step.record

    @torch.no_grad()
    def __call__(self, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """Run the layers; see `SimulateLoop`."""
        hidden = _through(self._parts, self._step, hidden, calls)
        self._step.finish()
        return hidden
