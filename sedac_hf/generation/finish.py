"""What is done with the records of a call of `generate` once it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.session import ExitSession, ExitStats, StepRecord

__all__ = ["finish_generation"]

IntArray = npt.NDArray[np.int64]


def finish_generation(result: Any, session: ExitSession, stats: ExitStats) -> None:
    """Add a call's tokens to the totals, and its exit layers to its output.

    Args:
        result: What `generate` returned: sequences, or an output object that gets `exit_layers`
            `[rows, new_tokens]` and, in exact mode, `drafts` (see `DraftStats.to_dict`).
        session: The call.
        stats: Totals of the model.
    """
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
        real = _before_end(new, session.eos_tokens)
        _count(session.records[: new.shape[1]], real, stats)
    else:
        _count(session.records, None, stats)
    if is_output:
        layers = _layers_of_rows(session.records, new.shape, beams, stats.depth)
        result["exit_layers"] = torch.from_numpy(layers)


def _finish_exact(result: Any, session: ExitSession, stats: ExitStats) -> None:
    """Every token of exact mode has gone through the full depth."""
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    new = sequences[:, session.prompt_length :]
    full = np.full(tuple(new.shape), stats.depth, np.int64)
    real = full[_before_end(new, session.eos_tokens)]
    stats.add(real, np.zeros((len(real), len(stats.exits_by_layer)), np.bool_))
    if not isinstance(result, Tensor):
        result["exit_layers"] = torch.from_numpy(full)


def _count(
    records: Sequence[StepRecord], real: npt.NDArray[np.bool_] | None, stats: ExitStats
) -> None:
    for step, record in enumerate(records):
        rows = slice(None) if real is None else real[:, step]
        stats.add(record.layers[rows], record.tries[rows])


def _before_end(new: Tensor, eos_tokens: Tensor | None) -> npt.NDArray[np.bool_]:
    """Whether each new token belongs to its row's text, the end token included, `[rows, new]`."""
    if eos_tokens is None:
        return np.ones(tuple(new.shape), np.bool_)
    is_end = torch.isin(new, eos_tokens.to(new.device)).long()
    return np.asarray(((is_end.cumsum(-1) - is_end) == 0).cpu(), np.bool_)


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
