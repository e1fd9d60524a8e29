"""Whole sequences one position after the other, where each depends on what the last one did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from sedac_hf.core.decoder_loop import DecodeLoop, ExitParts
from sedac_hf.core.recorded_pass import RecordedPass
from sedac_hf.core.session import ExitSession, StepRecord

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CascadeController

__all__ = ["empty_trace", "step_by_step"]

Mask = npt.NDArray[np.bool_]


def step_by_step(
    parts: ExitParts, cascade: CascadeController, arguments: dict[str, Any], eligible: Mask
) -> tuple[StepRecord, Tensor]:
    """Run the very loop of decoding over given sequences.

    Args:
        parts: What exits are made of; with a `RecordedPass` exits are settled.
        cascade: Decides who leaves.
        arguments: What the base's forward is given; whole sequences, no cache.
        eligible: Positions that may leave, `[rows, seq]`.

    Returns:
        What each position did, and its state for the final norm, `[rows, seq, width]`.
    """
    rows, seq = eligible.shape
    trace = empty_trace(parts, rows, seq)
    recorded = parts.passes if isinstance(parts.passes, RecordedPass) else None
    session = ExitSession(
        owner=parts, mode="certified", cascade=cascade, settles=recorded is not None
    )
    cache = DynamicCache(config=parts.shell.base.config)
    mask = arguments.get("attention_mask")
    first = int(eligible.any(axis=0).argmax()) if eligible.any() else seq
    found = []
    at = 0
    while at < seq:
        stop = first if at < first else at + 1
        step = {name: _positions(name, value, at, stop) for name, value in arguments.items()}
        step |= parts.shell.cached(cache)
        rule = None if at < first else eligible[:, at]
        read = step.get("input_ids")
        loop = DecodeLoop(parts, session, step.get("attention_mask", mask), rule, read)
        if recorded is not None:
            recorded.span = slice(at, stop)
        found.append(loop(*parts.shell.prologue(**step)))
        if session.pending is not None:
            _take(trace, session.pending, at)
        if cascade.config.adaptive_decay is not None and stop < seq:
            record = session.pending or StepRecord.full_depth(
                rows, parts.shell.num_layers, len(parts.heads)
            )
            # What came before the last position of a row's prompt is no part of its history.
            seen = eligible[:, stop - 1] | eligible[:, stop]
            session.note(record, parts.shell.logits(found[-1][:, -1:])[:, 0], seen)
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


def empty_trace(parts: ExitParts, rows: int, seq: int) -> StepRecord:
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
