"""The exit rule over whole sequences, position by position as generation applies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from sedac_hf.core.decoder_loop import (
    DecodeLoop,
    ExitParts,
    checkpoint_decision,
    top_probability,
)
from sedac_hf.core.session import ExitSession, StepRecord
from sedac_hf.errors import ConfigError, ModeError
from sedac_hf.generation.logits_processor import scale_exits
from sedac_hf.modeling_outputs import SedacOutput

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import LayerCall
    from sedac_hf.core.cascade_controller import CascadeController

__all__ = ["SimulateLoop", "eligible_positions", "simulate"]

Mask = npt.NDArray[np.bool_]


def simulate(
    parts: ExitParts,
    cascade: CascadeController,
    arguments: dict[str, Any],
    exit_start: Tensor | int | None,
) -> SedacOutput:
    """Run whole sequences with the rule of decoding at every eligible position.

    Args:
        parts: What exits are made of.
        cascade: Decides who leaves.
        arguments: What the base's forward is given.
        exit_start: First position of each row at which exits may act; None is 0.

    Returns:
        The base's output, with what each position did.

    Raises:
        ModeError: If a cache is given or the mask is not `[rows, seq]`.
    """
    arguments = {**arguments, "use_cache": False}
    labels, keep = arguments.pop("labels", None), arguments.pop("logits_to_keep", 0)
    if arguments.pop("past_key_values", None) is not None:
        raise ModeError("exits='simulate' runs whole sequences: it takes no past_key_values.")
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ModeError("exits='simulate' needs an attention mask of shape [rows, seq], or none.")
    given = arguments.get("input_ids")
    given = arguments["inputs_embeds"] if given is None else given
    eligible = eligible_positions((given.shape[0], given.shape[1]), exit_start, mask)
    if parts.layout.has_feedback:
        trace, logits = _step_by_step(parts, cascade, arguments, eligible)
    else:
        loop = SimulateLoop(parts, cascade, eligible)
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
    if labels is not None:
        base = parts.shell.base
        vocabulary = parts.shell.vocabulary_size
        output.loss = base.loss_function(
            logits=output.logits, labels=labels[:, _kept(keep)], vocab_size=vocabulary
        )
    return output


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

    def __init__(self, parts: ExitParts, cascade: CascadeController, eligible: Mask) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            cascade: Decides who leaves.
            eligible: Positions that may leave, `[rows, seq]`.
        """
        self._parts = parts
        self._cascade = cascade
        self._eligible = eligible
        self.trace = _empty_trace(parts, eligible.shape[0], eligible.shape[1])

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
        state = self._cascade.start(rows * seq)
        active = self._eligible.copy()
        exits: Tensor | None = None
        left: Tensor | None = None
        at = 0
        for k, head in enumerate(parts.heads):
            stop = head.layer_idx + 1
            hidden = parts.passes.run(hidden, calls, at, stop, left)
            at = stop
            tries = self._ask(k, hidden, state, active)
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

    def _ask(self, k: int, hidden: Tensor, state: Any, active: Mask) -> Mask:
        """Positions that try at checkpoint `k`, `[rows, seq]`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        decision = checkpoint_decision(
            self._parts, self._cascade, k, flat, state, active.reshape(-1)
        )
        trace = self.trace
        trace.risks[..., k] = decision.risk.reshape(active.shape)
        trace.confidences[..., k] = decision.confidence.reshape(active.shape)
        trace.tries[..., k] = decision.try_exit.reshape(active.shape)
        tried: Mask = trace.tries[..., k]
        return tried

    def _sure_enough(self, k: int, found: Tensor, tries: Mask) -> Mask:
        """Those positions that try and whose exit gives some word enough probability."""
        least = self._cascade.config.layers[k].min_probability
        if least <= 0:
            return tries
        rows, columns = np.nonzero(tries)
        # Only positions that try need logits.
        picked = found[torch.from_numpy(rows), torch.from_numpy(columns)].unsqueeze(0)
        probability = top_probability(self._parts, picked)[0]
        self.trace.probabilities[rows, columns, k] = probability
        leaving = tries.copy()
        leaving[rows, columns] = probability >= least
        return leaving


def _step_by_step(
    parts: ExitParts, cascade: CascadeController, arguments: dict[str, Any], eligible: Mask
) -> tuple[StepRecord, Tensor]:
    """The same one position after the other: with feedback each depends on the one before."""
    rows, seq = eligible.shape
    trace = _empty_trace(parts, rows, seq)
    session = ExitSession(owner=parts, mode="certified", cascade=cascade)
    cache = DynamicCache(config=parts.shell.base.config)
    mask = arguments.get("attention_mask")
    first = int(eligible.any(axis=0).argmax()) if eligible.any() else seq
    found = []
    at = 0
    while at < seq:
        stop = first if at < first else at + 1
        step = {name: _positions(name, value, at, stop) for name, value in arguments.items()}
        step |= {"use_cache": True, "past_key_values": cache}
        rule = None if at < first else eligible[:, at]
        loop = DecodeLoop(parts, session, step.get("attention_mask", mask), rule)
        found.append(parts.shell.run(loop, **step).logits)
        if session.pending is not None:
            _take(trace, session.pending, at)
        at = stop
    return trace, torch.cat(found, dim=1)


def _positions(name: str, value: Any, start: int, stop: int) -> Any:
    """The part of an argument that belongs to positions `start` to `stop - 1`."""
    if name == "attention_mask":
        return None if value is None else value[:, :stop]
    if name in ("input_ids", "inputs_embeds") and value is not None:
        return value[:, start:stop]
    if name == "position_ids" and value is not None:
        return value[..., start:stop]
    return value


def _take(trace: StepRecord, record: StepRecord, position: int) -> None:
    for name in ("layers", "checkpoints", "risks", "confidences", "probabilities", "tries"):
        getattr(trace, name)[:, position] = getattr(record, name)


def _empty_trace(parts: ExitParts, rows: int, seq: int) -> StepRecord:
    """A record with one more axis, for positions."""
    flat = StepRecord.full_depth(rows * seq, parts.shell.num_layers, len(parts.heads))
    shape = (rows, seq)
    count = len(parts.heads)
    return StepRecord(
        layers=flat.layers.reshape(shape),
        checkpoints=flat.checkpoints.reshape(shape),
        risks=flat.risks.reshape(*shape, count),
        confidences=flat.confidences.reshape(*shape, count),
        probabilities=flat.probabilities.reshape(*shape, count),
        tries=flat.tries.reshape(*shape, count),
    )


def _kept(keep: int | Tensor) -> Any:
    """What `logits_to_keep` selects: the last n positions, all of them at 0, or those named."""
    return keep if isinstance(keep, Tensor) else slice(-keep if keep else None, None)
