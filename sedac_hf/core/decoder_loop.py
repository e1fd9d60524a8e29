"""The decoder-layer loop: segments between checkpoints, rows that have left, the exits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.exit_cache import ExitCache, predecessor_visible, previous_states
from sedac_hf.core.exit_check import check_step, hold_by, still_live
from sedac_hf.core.exit_step import ExitStep
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.session import ExitSession

if TYPE_CHECKING:
    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.base_shell import BaseShell, LayerCall
    from sedac_hf.core.draft_head import DraftHead
    from sedac_hf.core.exit_heads import ExitHead
    from sedac_hf.core.kv_fill import KVFill
    from sedac_hf.core.narrow_tail import KeptChannels, NarrowTail
    from sedac_hf.core.probe_inference import ProbeManager
    from sedac_hf.core.recorded_pass import RecordedPass

__all__ = ["DecodeLoop", "ExitParts", "LayerPass", "heads_follow"]

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


class LayerPass:
    """Runs n rows with their positions from one layer to another, or only fills their K/V.

    Positions, masks and the cache travel in the recorded calls.
    """

    def __init__(self, shell: BaseShell, fill: KVFill, narrow: NarrowTail | None = None) -> None:
        """Run the base's own layers.

        Args:
            shell: Shell of the base.
            fill: Fills skipped layers.
            narrow: The layers with fewer channels; None where there is no order of channels.
        """
        self._shell = shell
        self._fill = fill
        self.narrow = narrow

    def run(
        self,
        hidden: Tensor,
        calls: list[LayerCall],
        start: int,
        stop: int,
        left: Tensor | None = None,
        kept: KeptChannels | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """Run layers `start` to `stop - 1`.

        Args:
            hidden: States `[rows, seq, width]`.
            calls: Recorded calls of all layers.
            start: First layer.
            stop: End of the layers.
            left: What has left, broadcastable to `[rows, seq, 1]`: it keeps its state, from which
                its K/V are written. None when nothing has.
            kept: How much of the MLPs each token of `[rows, seq]` runs; None for all.
            spread: Takes how evenly the last of these layers attends; None where nobody asks.

        Returns:
            States after layer `stop - 1`.
        """
        layers = self._shell.layer_list
        for i in range(start, stop):
            call = calls[i]
            layer = layers[i] if kept is None else self._narrowed(i, kept)
            if spread is not None and i == stop - 1:
                output = spread.run(layer, hidden, *call.args, **call.kwargs)
            else:
                output = layer(hidden, *call.args, **call.kwargs)
            if isinstance(output, tuple):
                output = output[0]
            if left is None:
                hidden = output
            else:
                hidden = torch.where(left.to(output.device), hidden.to(output.device), output)
        return hidden

    def _narrowed(self, i: int, kept: KeptChannels) -> Any:
        assert self.narrow is not None  # a session with soft exits has seen to it
        return self.narrow.layer(i, kept.eighths[i])

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
    gates: GateParts = field(default_factory=GateParts)

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


def heads_follow(layout: ExitCache, session: ExitSession, cache: Any) -> bool:
    """Whether the exit heads have K/V of every position that the base has.

    Args:
        layout: Where heads keep their K/V; their layers are appended to an empty cache.
        session: The call; the answer for a cache is remembered in it.
        cache: A transformers cache.
    """
    if session.cache is not cache:
        session.cache = cache
        session.in_step = layout.attach(cache)
        if not session.in_step:
            logger.warning(
                "The cache that was given holds positions that the exit heads have not seen, "
                "so exits stay off. Let generate fill the cache from its beginning."
            )
    return session.in_step


class DecodeLoop:
    """One forward of generation: whole depth for prompts, exits in decode steps."""

    def __init__(
        self,
        parts: ExitParts,
        session: ExitSession,
        attention_mask: Any = None,
        eligible: Mask | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            session: The call this forward belongs to.
            attention_mask: As given to the base; tells where padding is.
            eligible: Rows that may leave in this step, which is then taken for a decode step even
                if nothing came before it. None is the usual rule.
            tokens: Ids that are read, `[rows, seq]`; None where embeddings were given.
        """
        self._parts = parts
        self._session = session
        self._mask = attention_mask
        self._eligible = eligible
        self._tokens = tokens

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
        if cache is None or not heads_follow(parts.layout, session, cache):
            return parts.passes.run(hidden, calls, 0, len(calls))
        if hidden.shape[1] > 1 or session.cascade is None:
            return self._prefill(hidden, calls, cache)
        if self._eligible is None and int(cache.get_seq_length()) == 0:
            return self._prefill(hidden, calls, cache)
        return self._decode(hidden, calls, cache)

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
        step = self._begin(hidden)
        settles = self._session.settles
        feedback = None
        if parts.layout.has_feedback:
            feedback = parts.layout.last_state(cache, hidden)
        at = 0
        for k, head in enumerate(parts.heads):
            stop, spread = head.layer_idx + 1, step.spread_at(k)
            left = None if settles else step.left
            hidden = parts.passes.run(hidden, calls, at, stop, left, spread=spread)
            at = stop
            if not step.tries(k, hidden, None if spread is None else spread.last):
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
        self._check(step, hidden)
        output = step.output(hidden)
        if parts.layout.has_feedback:
            parts.layout.push_states(cache, output)
        self._session.pending = step.record
        return output

    def _begin(self, hidden: Tensor) -> ExitStep:
        """The step; a watch may have it look at other rules, or hold back some exits."""
        session = self._session
        watch = session.watch
        read = None if self._tokens is None else self._tokens[:, -1].cpu().numpy()
        if watch is None:
            return ExitStep(self._parts, session, hidden, self._eligible, tokens=read)
        rule = watch.look()
        # Settled exits are run on in any case.
        holds = rule is not None or not session.settles
        hold = hold_by(watch, session.live) if holds else None
        return ExitStep(
            self._parts, session, hidden, self._eligible,
            rule=rule, hold=hold, follows=session.settles, tokens=read,
        )  # fmt: skip

    def _check(self, step: ExitStep, hidden: Tensor) -> None:
        """Hold some exits against full depth, which their rows have been run to."""
        session = self._session
        watch = session.watch
        if watch is None or session.cascade is None:
            return
        rows = step.held >= 0
        left = step.record.checkpoints >= 0
        if session.settles and left.any():
            rows = watch.pick(still_live(left, session.live), runs_on=False)
        layers = session.cascade.config.layers
        temperatures = [layer.temperature for layer in layers]
        check_step(step, rows, hidden, self._parts.shell.logits, temperatures, watch)
