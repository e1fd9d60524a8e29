"""The decoder-layer loop: segments between checkpoints, rows that have left, the exits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.exit_cache import ExitCache, predecessor_visible, previous_states
from sedac_hf.core.session import ExitSession, StepRecord

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell, LayerCall
    from sedac_hf.core.cascade_controller import CascadeController, CheckpointDecision
    from sedac_hf.core.draft_head import DraftHead
    from sedac_hf.core.exit_heads import ExitHead
    from sedac_hf.core.kv_fill import KVFill
    from sedac_hf.core.probe_inference import ProbeManager
    from sedac_hf.core.recorded_pass import RecordedPass

__all__ = ["DecodeLoop", "ExitParts", "LayerPass", "checkpoint_decision", "top_probability"]

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
# Logits that are held at once when only their largest probability is wanted.
_MAX_LOGITS = 1 << 24


class LayerPass:
    """Runs n rows with their positions from one layer to another, or only fills their K/V.

    Positions, masks and the cache travel in the recorded calls.
    """

    def __init__(self, shell: BaseShell, fill: KVFill) -> None:
        """Run the base's own layers.

        Args:
            shell: Shell of the base.
            fill: Fills skipped layers.
        """
        self._shell = shell
        self._fill = fill

    def run(
        self,
        hidden: Tensor,
        calls: list[LayerCall],
        start: int,
        stop: int,
        left: Tensor | None = None,
    ) -> Tensor:
        """Run layers `start` to `stop - 1`.

        Args:
            hidden: States `[rows, seq, width]`.
            calls: Recorded calls of all layers.
            start: First layer.
            stop: End of the layers.
            left: What has left, broadcastable to `[rows, seq, 1]`: it keeps its state, from which
                its K/V are written. None when nothing has.

        Returns:
            States after layer `stop - 1`.
        """
        layers = self._shell.layer_list
        for i in range(start, stop):
            call = calls[i]
            output = layers[i](hidden, *call.args, **call.kwargs)
            if isinstance(output, tuple):
                output = output[0]
            if left is None:
                hidden = output
            else:
                hidden = torch.where(left.to(output.device), hidden.to(output.device), output)
        return hidden

    def run_all(self, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """Run every layer: the loop without exits."""
        return self.run(hidden, calls, 0, len(calls))

    def fill(self, hidden: Tensor, calls: list[LayerCall], start: int, stop: int) -> None:
        """Write the K/V of layers `start` to `stop - 1` from frozen states."""
        self._fill.fill(hidden, calls, start, stop)


@dataclass(frozen=True)
class ExitParts:
    """Everything that exits are made of, beside the base."""

    shell: BaseShell
    passes: LayerPass | RecordedPass
    heads: Sequence[ExitHead]
    probes: ProbeManager
    draft: DraftHead
    layout: ExitCache

    def apply_head(
        self, k: int, hidden: Tensor, calls: list[LayerCall], cache: Any, feedback: Tensor | None
    ) -> Tensor:
        """State for the base's final norm from head `k`, `[rows, seq, width]`."""
        head = self.heads[k]
        call = calls[head.spec.template_layer]
        given = feedback if head.spec.feedback else None
        state: Tensor = head(hidden, call, cache, self.layout.first_layer[k], given)
        return state

    def fill_head(
        self, k: int, hidden: Tensor, calls: list[LayerCall], cache: Any, feedback: Tensor | None
    ) -> None:
        """K/V of head `k` alone."""
        head = self.heads[k]
        call = calls[head.spec.template_layer]
        given = feedback if head.spec.feedback else None
        head.fill(hidden, call, cache, self.layout.first_layer[k], given)


class DecodeLoop:
    """One forward of generation: whole depth for prompts, exits in decode steps."""

    def __init__(
        self,
        parts: ExitParts,
        session: ExitSession,
        attention_mask: Any = None,
        eligible: Mask | None = None,
    ) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            session: The call this forward belongs to.
            attention_mask: As given to the base; tells where padding is.
            eligible: Rows that may leave in this step, which is then taken for a decode step even
                if nothing came before it. None is the usual rule.
        """
        self._parts = parts
        self._session = session
        self._mask = attention_mask
        self._eligible = eligible

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
        cache = parts.shell.cache_of(calls[0])
        if cache is None or not self._in_step(cache):
            return parts.passes.run(hidden, calls, 0, len(calls))
        if hidden.shape[1] > 1 or session.cascade is None:
            return self._prefill(hidden, calls, cache)
        if self._eligible is None and int(cache.get_seq_length()) == 0:
            return self._prefill(hidden, calls, cache)
        return self._decode(hidden, calls, cache)

    def _in_step(self, cache: Any) -> bool:
        """Whether the exit heads have K/V of every position that the base has."""
        session = self._session
        if session.cache is not cache:
            session.cache = cache
            session.in_step = self._parts.layout.attach(cache)
            if not session.in_step:
                logger.warning(
                    "The cache that was given holds positions that the exit heads have not seen, "
                    "so exits stay off. Let generate fill the cache from its beginning."
                )
        return session.in_step

    def _prefill(self, hidden: Tensor, calls: list[LayerCall], cache: Any) -> Tensor:
        """All layers for all positions; the heads' K/V are filled on the way."""
        parts = self._parts
        states, at = [], 0
        for head in parts.heads:
            hidden = parts.passes.run(hidden, calls, at, head.layer_idx + 1)
            at = head.layer_idx + 1
            states.append(hidden)
        hidden = parts.passes.run(hidden, calls, at, len(calls))
        feedback = None
        if parts.layout.has_feedback:
            before = parts.layout.last_state(cache, hidden)
            past = int(cache.get_seq_length()) - hidden.shape[1]
            visible = predecessor_visible(self._mask, past, hidden.shape[1])
            feedback = previous_states(hidden, before, visible)
            parts.layout.push_states(cache, hidden)
        for k, state in enumerate(states):
            parts.fill_head(k, state, calls, cache, feedback)
        return hidden

    def _decode(self, hidden: Tensor, calls: list[LayerCall], cache: Any) -> Tensor:
        """One position per row; each row leaves at the first checkpoint that lets it.

        Where exits are settled, the tail is run all the same: here at once, which costs what a
        plain step costs. Loops that can wait with it have the same results.
        """
        parts = self._parts
        step = _Step(parts, self._session, hidden, self._eligible)
        settles = self._session.settles
        feedback = None
        if parts.layout.has_feedback:
            feedback = parts.layout.last_state(cache, hidden)
        at = 0
        for k, head in enumerate(parts.heads):
            stop = head.layer_idx + 1
            hidden = parts.passes.run(hidden, calls, at, stop, None if settles else step.left)
            at = stop
            if not step.tries(k, hidden):
                parts.fill_head(k, hidden, calls, cache, feedback)
                continue
            step.leave(k, parts.apply_head(k, hidden, calls, cache, feedback))
            if step.all_left and not settles:
                for later in range(k + 1, len(parts.heads)):
                    parts.fill_head(later, hidden, calls, cache, feedback)
                parts.passes.fill(hidden, calls, at, len(calls))
                break
        else:
            left = None if settles else step.left
            hidden = parts.passes.run(hidden, calls, at, len(calls), left)
        output = step.output(hidden)
        if parts.layout.has_feedback:
            parts.layout.push_states(cache, output)
        self._session.pending = step.record
        return output


class _Step:
    """Who is still on the way in one decode step, and with which state the others left."""

    def __init__(
        self, parts: ExitParts, session: ExitSession, hidden: Tensor, eligible: Mask | None
    ) -> None:
        rows = hidden.shape[0]
        assert session.cascade is not None
        self._parts = parts
        self._cascade: CascadeController = session.cascade
        self._state = self._cascade.start(rows)
        self._active = np.ones(rows, np.bool_) if eligible is None else eligible.copy()
        self._gone = np.zeros(rows, np.bool_)
        self._asks = bool(self._active.any())
        self._try = self._gone
        self.all_left = False
        self._exits: Tensor | None = None
        depth = parts.shell.num_layers
        self.record = StepRecord.full_depth(rows, depth, len(parts.heads))
        self.left: Tensor | None = None

    def tries(self, k: int, hidden: Tensor) -> bool:
        """Ask the cascade about checkpoint `k`; whether any row is to try its head."""
        if not self._asks:
            return False
        decision = checkpoint_decision(
            self._parts, self._cascade, k, hidden[:, 0], self._state, self._active
        )
        record = self.record
        record.risks[:, k] = decision.risk
        record.confidences[:, k] = decision.confidence
        record.tries[:, k] = self._try = decision.try_exit
        return decision.tries > 0

    def leave(self, k: int, exit_states: Tensor) -> None:
        """Let the rows go that try at checkpoint `k` and whose exit is sure enough."""
        leaving = self._try
        least = self._cascade.config.layers[k].min_probability
        if least > 0:
            probability = top_probability(self._parts, exit_states)[:, 0]
            self.record.probabilities[leaving, k] = probability[leaving]
            leaving = leaving & (probability >= least)
        if not leaving.any():
            return
        self._active = self._active & ~leaving
        self._asks = bool(self._active.any())
        self._gone = self._gone | leaving
        self.all_left = bool(self._gone.all())
        self.record.layers[leaving] = self._parts.heads[k].layer_idx
        self.record.checkpoints[leaving] = k
        now = torch.from_numpy(leaving).to(exit_states.device).view(-1, 1, 1)
        if self._exits is None:
            self._exits = exit_states
        else:
            self._exits = torch.where(now, exit_states, self._exits.to(exit_states.device))
        self.left = torch.from_numpy(self._gone).to(exit_states.device).view(-1, 1, 1)

    def output(self, hidden: Tensor) -> Tensor:
        """Each row's state for the final norm."""
        if self._exits is None or self.left is None:
            return hidden
        exits = self._exits.to(hidden.device)
        return torch.where(self.left.to(hidden.device), exits, hidden)


def checkpoint_decision(
    parts: ExitParts,
    cascade: CascadeController,
    k: int,
    states: Tensor,
    state: Any,
    active: Mask,
) -> CheckpointDecision:
    """Risk, normalised confidence and whether to try, for each row at checkpoint `k`.

    Args:
        parts: What exits are made of.
        cascade: The cascade.
        k: Index of the checkpoint.
        states: Hidden states `[rows, width]`.
        state: What the cascade has accumulated for these rows.
        active: Rows that are still asked, `[rows]`.

    Returns:
        The decision; NaN risk and confidence, and no try, for rows that are not asked.
    """
    if states.device.type == "cpu":
        return cascade.step(k, states, state, active)
    decision = cascade.step_risk(k, parts.probes.risk(k, states), state, active)
    risk = np.where(active, decision.risk, np.float32(np.nan))
    return decision._replace(risk=risk)


def top_probability(parts: ExitParts, exit_states: Tensor) -> npt.NDArray[np.float32]:
    """Largest probability that an exit gives to a word of the draft vocabulary.

    Args:
        parts: What exits are made of.
        exit_states: States for the final norm, `[rows, seq, width]`.

    Returns:
        Probabilities `[rows, seq]`; NaN where the logits are not finite.
    """
    vocabulary = parts.draft.linear
    width = vocabulary.out_features if vocabulary is not None else parts.shell.vocabulary_size
    chunk = max(1, _MAX_LOGITS // (width * max(1, exit_states.shape[0])))
    found = []
    for at in range(0, exit_states.shape[1], chunk):
        part = exit_states[:, at : at + chunk]
        logits = parts.shell.logits(part, vocabulary=vocabulary).float()
        found.append((logits.amax(-1) - logits.logsumexp(-1)).exp())
    # Decisions carry no gradient.
    return np.asarray(torch.cat(found, dim=1).detach().cpu(), np.float32)
