"""The exit rule over whole sequences, position by position as generation applies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.cache_names import cache_in
from sedac_hf.core.cascade_state import StepContext
from sedac_hf.core.decoder_loop import ExitParts
from sedac_hf.core.exit_step import checkpoint_decision, top_probability
from sedac_hf.core.recorded_pass import RecordedPass
from sedac_hf.core.soft_loop import SoftSimulation
from sedac_hf.core.stepwise import empty_trace, step_by_step
from sedac_hf.errors import ConfigError, ModeError
from sedac_hf.generation.logits_processor import scale_exits
from sedac_hf.modeling_outputs import SedacOutput

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import LayerCall
    from sedac_hf.core.cascade_controller import CascadeController
    from sedac_hf.core.session import StepRecord

__all__ = ["SimulateLoop", "eligible_positions", "settled_states", "simulate"]

Mask = npt.NDArray[np.bool_]


def simulate(
    parts: ExitParts,
    cascade: CascadeController,
    arguments: dict[str, Any],
    exit_start: Tensor | int | None,
    *,
    settles: bool = False,
) -> SedacOutput:
    """Run whole sequences with the rule of decoding at every eligible position.

    Args:
        parts: What exits are made of.
        cascade: Decides who leaves.
        arguments: What the base's forward is given.
        exit_start: First position of each row at which exits may act; None is 0.
        settles: Whether the tail of exited tokens is run after all, so that K/V are the base's; not
            that of soft exits, whose K/V are those of the narrower tail.

    Returns:
        The base's output, with what each position did.

    Raises:
        ModeError: If a cache is given or the mask is not `[rows, seq]`.
    """
    arguments = {**arguments, "use_cache": False}
    labels, keep = arguments.pop("labels", None), arguments.pop("logits_to_keep", 0)
    if cache_in(arguments) is not None:
        raise ModeError(
            "exits='simulate' runs whole sequences: it takes no cache (past_key_values)."
        )
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ModeError("exits='simulate' needs an attention mask of shape [rows, seq], or none.")
    given = arguments.get("input_ids")
    given = arguments["inputs_embeds"] if given is None else given
    eligible = eligible_positions((given.shape[0], given.shape[1]), exit_start, mask)
    loop: SimulateLoop | SoftSimulation
    if cascade.config.is_soft:
        loop = SoftSimulation(parts, cascade, eligible)
        logits = parts.shell.run(loop, **arguments).logits
        trace = loop.trace
    elif settles:
        recorded = RecordedPass.record(parts, arguments, cascade.attentive)
        trace, states = settled_states(parts, cascade, recorded, arguments, eligible)
        logits = parts.shell.logits(states)
    elif goes_step_by_step(parts, cascade):
        trace, states = step_by_step(parts, cascade, arguments, eligible)
        logits = parts.shell.logits(states)
    else:
        loop = SimulateLoop(parts, cascade, eligible, arguments.get("input_ids"))
        logits = parts.shell.run(loop, **arguments).logits
        trace = loop.trace
    layers = cascade.config.layers
    logits = scale_exits(logits, trace.checkpoints, [layer.temperature for layer in layers])
    output = SedacOutput(
        logits=logits[:, _kept(keep)],
        exit_layers=torch.from_numpy(trace.layers),
        risks=torch.from_numpy(trace.risks),
        confidences=torch.from_numpy(trace.confidences),
        probabilities=torch.from_numpy(trace.probabilities),
    )
    if trace.soft_exits is not None and trace.kept is not None:
        output.soft_exits = torch.from_numpy(trace.soft_exits)
        output.kept_shares = torch.from_numpy(trace.kept)
    if labels is not None:
        base = parts.shell.base
        vocabulary = parts.shell.vocabulary_size
        output.loss = base.loss_function(
            logits=output.logits, labels=labels[:, _kept(keep)], vocab_size=vocabulary
        )
    return output


def settled_states(
    parts: ExitParts,
    cascade: CascadeController,
    recorded: RecordedPass,
    arguments: dict[str, Any],
    eligible: Mask,
) -> tuple[StepRecord, Tensor]:
    """What each position does where exits are settled; many cascades can share one recording.

    Args:
        parts: What exits are made of.
        cascade: Decides who leaves.
        recorded: The base's states over the same sequences.
        arguments: What the base's forward was given.
        eligible: Positions that may leave, `[rows, seq]`.

    Returns:
        What each position did, and its state for the final norm, `[rows, seq, width]`.
    """
    parts = recorded.put_into(parts)
    if goes_step_by_step(parts, cascade):
        return step_by_step(parts, cascade, arguments, eligible)
    recorded.span = slice(None)  # another cascade may have gone step by step
    loop = SimulateLoop(parts, cascade, eligible, arguments.get("input_ids"))
    hidden, calls = parts.shell.prologue(**{**arguments, "use_cache": False})
    return loop.trace, loop(hidden, calls)


def goes_step_by_step(parts: ExitParts, cascade: CascadeController) -> bool:
    """Whether what a position does depends on what those before it did, beyond their K/V.

    Args:
        parts: What exits are made of.
        cascade: Decides who leaves.
    """
    return parts.layout.has_feedback or cascade.config.adaptive_decay is not None


def eligible_positions(
    shape: tuple[int, int], exit_start: Tensor | int | None, attention_mask: Tensor | None
) -> Mask:
    """Positions at which exits may act.

    Args:
        shape: Rows and positions.
        exit_start: First position of each row, `[rows]` or one for all; None is 0.
        attention_mask: `[rows, seq]`, or None without padding. Padding never leaves.

    Returns:
        `[rows, seq]`.

    Raises:
        ConfigError: If `exit_start` has not one value per row.
    """
    rows, seq = shape
    start = np.asarray(torch.as_tensor(0 if exit_start is None else exit_start).cpu())
    if start.ndim > 1 or start.size not in (1, rows):
        raise ConfigError(
            f"exit_start must be one position or one per row ({rows}), found shape {start.shape}."
        )
    eligible = np.arange(seq)[None, :] >= np.broadcast_to(start.reshape(-1), (rows,))[:, None]
    if attention_mask is not None:
        eligible = eligible & np.asarray(attention_mask.cpu() != 0)
    return eligible


class SimulateLoop:
    """A loop for the base shell in which every position follows the rule of decoding.

    Positions that leave keep their state from there on, so that deeper layers see the K/V which
    `propagate` would have written.

    Attributes:
        trace: What each position did; arrays `[rows, seq]` and `[rows, seq, checkpoints]`.
    """

    def __init__(
        self,
        parts: ExitParts,
        cascade: CascadeController,
        eligible: Mask,
        tokens: Tensor | None = None,
    ) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            cascade: Decides who leaves.
            eligible: Positions that may leave, `[rows, seq]`.
            tokens: Ids that are read, same shape; None where embeddings were given.
        """
        self._tokens = None if tokens is None else tokens.reshape(-1).cpu().numpy()
        self._parts = parts
        self._cascade = cascade
        self._eligible = eligible
        self.trace = empty_trace(parts, eligible.shape[0], eligible.shape[1])

    def __call__(self, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """Run the layers.

        Args:
            hidden: Embeddings `[rows, seq, width]`.
            calls: One recorded call per layer, without a cache.

        Returns:
            States for the base's final norm, same shape.
        """
        parts, trace = self._parts, self.trace
        rows, seq, _ = hidden.shape
        context = StepContext(before=hidden.reshape(rows * seq, -1), tokens=self._tokens)
        self._state = state = self._cascade.start(rows * seq, context)
        active = self._eligible.copy()
        exits: Tensor | None = None
        left: Tensor | None = None
        at = 0
        for k, head in enumerate(parts.heads):
            stop, spread = head.layer_idx + 1, self._cascade.spread_at(k)
            hidden = parts.passes.run(hidden, calls, at, stop, left, spread=spread)
            at = stop
            tries = self._ask(k, hidden, state, active, None if spread is None else spread.flat)
            if not tries.any():
                continue
            found = parts.apply_head(k, hidden, calls, None, None)
            leaving = self._sure_enough(k, found, tries)
            if not leaving.any():
                continue
            active &= ~leaving
            trace.layers[leaving] = head.layer_idx
            trace.checkpoints[leaving] = k
            now = torch.from_numpy(leaving).to(found.device).unsqueeze(-1)
            exits = found if exits is None else torch.where(now, found, exits.to(found.device))
            left = torch.from_numpy(trace.checkpoints >= 0).to(found.device).unsqueeze(-1)
        hidden = parts.passes.run(hidden, calls, at, len(calls), left)
        if exits is None or left is None:
            return hidden
        return torch.where(left.to(hidden.device), exits.to(hidden.device), hidden)

    def _ask(self, k: int, hidden: Tensor, state: Any, active: Mask, spread: Tensor | None) -> Mask:
        """Positions that try at checkpoint `k`, `[rows, seq]`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        decision = checkpoint_decision(
            self._parts, self._cascade, k, flat, state, active.reshape(-1), spread
        )
        trace = self.trace
        trace.risks[..., k] = decision.risk.reshape(active.shape)
        trace.confidences[..., k] = decision.confidence.reshape(active.shape)
        trace.tries[..., k] = decision.try_exit.reshape(active.shape)
        tried: Mask = trace.tries[..., k]
        return tried

    def _sure_enough(self, k: int, found: Tensor, tries: Mask) -> Mask:
        """Those positions that try and whose exit gives some word enough probability."""
        least = self._cascade.least_probability(k, self._state)
        if least is None:
            return tries
        rows, columns = np.nonzero(tries)
        # Only positions that try need logits.
        picked = found[torch.from_numpy(rows), torch.from_numpy(columns)].unsqueeze(0)
        own = np.full(tries.shape, np.nan, np.float32)
        own[rows, columns] = top_probability(self._parts, picked)[0]
        sure = self._cascade.sureness(k, own.reshape(-1), self._state).reshape(tries.shape)
        self.trace.probabilities[rows, columns, k] = sure[rows, columns]
        return tries & (sure >= least.reshape(tries.shape))


def _kept(keep: int | Tensor) -> Any:
    """What `logits_to_keep` selects: the last n positions, all of them at 0, or those named."""
    return keep if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
