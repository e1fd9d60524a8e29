"""What is done with the records of a call of `generate` once it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.core.session import ExitSession, StepRecord
from sedac_hf.generation.row_ends import rows_going

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from sedac_hf.metrics.call_meter import CallMeter

__all__ = ["finish_generation", "finish_off"]

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def finish_generation(result: Any, session: ExitSession, stats: ExitStats) -> None:
    """Add a call's tokens to the totals, and its exit layers to its output.

    Args:
        result: What `generate` returned: sequences, or an output object that gets `exit_layers`
            `[rows, new_tokens]` and, in exact mode, `drafts` (see `DraftStats.to_dict`).
        session: The call.
        stats: Totals of the model.
    """
    meter = session.meter
    if meter is not None:
        meter.end()
        if session.drafted is not None and session.drafted.reason:
            meter.event("without_drafts")
    if session.drafted is not None:
        stats.drafts.merge(session.drafted)
        if not isinstance(result, Tensor):
            result["drafts"] = session.drafted.to_dict()
    stats.add_tails(session.tails)
    if session.prompt_length is None:
        return
    if session.drafted is not None and not session.drafted.reason:
        _finish_exact(result, session, stats)
        return
    if not session.records:
        return
    is_output = not isinstance(result, Tensor)
    sequences: Tensor = result.sequences if is_output else result
    new = sequences[:, session.prompt_length :]
    beams: Tensor | None = getattr(result, "beam_indices", None)
    # Rows of the records are those of the batch, or its beams; the output may hold fewer.
    if session.records[0].layers.shape[0] == new.shape[0]:
        real: Mask | None = rows_going(new, session.eos_tokens)[:, :-1]
        records = session.records[: new.shape[1]]
    else:
        real, records = None, session.records
    _count(records, real, stats)
    if meter is not None and not meter.live:
        meter.afterwards(records, new.numpy(force=True).astype(np.int64), real)
    elif meter is not None and real is not None and new.shape[1]:
        meter.release(new[:, -1], real[:, -1])
    if is_output:
        layers = _layers_of_rows(session.records, new.shape, beams, stats.depth)
        result["exit_layers"] = torch.from_numpy(layers)


def finish_off(
    result: Any,
    meter: CallMeter,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    default: GenerationConfig | None,
) -> None:
    """Report the tokens of a call that the base answered alone.

    Args:
        result: What `generate` of the base returned.
        meter: Reports the call.
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
        default: The base's own settings.
    """
    prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    # Without a prompt the base begins with a token of its own, unless it was given embeddings.
    alone = 0 if kwargs.get("inputs_embeds") is not None else 1
    start = alone if prompt is None else prompt.shape[1]
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    ends = kwargs.get("eos_token_id")
    if "eos_token_id" not in kwargs:
        found = (getattr(config, "eos_token_id", None) for config in (given, default))
        ends = next((end for end in found if end is not None), None)
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    new = sequences[:, start:]
    ending = None if ends is None else torch.as_tensor(ends).flatten()
    real = rows_going(new, ending)[:, :-1]
    meter.all_at_once(new.numpy(force=True).astype(np.int64), real)
    meter.end()


def _finish_exact(result: Any, session: ExitSession, stats: ExitStats) -> None:
    """Every token of exact mode has gone through the full depth."""
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    new = sequences[:, session.prompt_length :]
    full = np.full(tuple(new.shape), stats.depth, np.int64)
    real = full[rows_going(new, session.eos_tokens)[:, :-1]]
    stats.add(real, np.zeros((len(real), len(stats.exits_by_layer)), np.bool_))
    if not isinstance(result, Tensor):
        result["exit_layers"] = torch.from_numpy(full)


def _count(records: Sequence[StepRecord], real: Mask | None, stats: ExitStats) -> None:
    for step, record in enumerate(records):
        rows = slice(None) if real is None else real[:, step]
        stats.add_record(record, rows)


def _layers_of_rows(
    records: Sequence[StepRecord], shape: Sequence[int], beams: Tensor | None, depth: int
) -> IntArray:
    """Exit layer of each new token; the full depth where a step left no record."""
    layers = np.full(tuple(shape), depth, np.int64)
    origin = None if beams is None else beams.cpu().numpy()
    for step, record in enumerate(records[: shape[1]]):
        if origin is not None:
            # A beam's token came from the row that its index names; -1 is padding.
            rows = origin[:, step]
            layers[:, step] = np.where(rows >= 0, record.layers[np.maximum(rows, 0)], depth)
        elif len(record.layers) == shape[0]:
            layers[:, step] = record.layers
    return layers
