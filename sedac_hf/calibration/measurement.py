"""Measures what each exit would have done to each token: the content of traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.documents import batches_of
from sedac_hf.calibration.head_training import exit_states
from sedac_hf.calibration.states import BaseStates, DocumentBatch, iter_logits
from sedac_hf.calibration.traces import Traces

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead
    from sedac_hf.core.probe_inference import ProbeManager

_SURE = 0.5  # least probability of the first choice for a token to count in `fit_temperatures`


@torch.inference_mode()
def collect_traces(
    heads: Sequence[ExitHead],
    probes: ProbeManager,
    shell: BaseShell,
    states: BaseStates,
    rows: Sequence[int],
    draft: Tensor,
    temperatures: Sequence[float] | None = None,
) -> Traces:
    """Judge every possible exit of every continuation token.

    Args:
        heads: Exit heads in the order of their checkpoints.
        probes: Their probes.
        shell: Shell of the base.
        states: Recorded states.
        rows: Documents to look at.
        draft: Draft vocabulary, token ids.
        temperatures: What each exit's logits are divided by; None means 1.

    Returns:
        Traces of these documents, in the given order.
    """
    columns = len(heads)
    temperatures = temperatures or [1.0] * columns
    first = {i: max(states.documents[i].prompt_length, 1) for i in rows}
    lengths = np.array([len(states.documents[i]) - first[i] for i in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = {i: int(offsets[n]) for n, i in enumerate(rows)}
    total = int(offsets[-1])
    eligible = np.ones(total, dtype=np.bool_)
    eligible[offsets[:-1][lengths > 0]] = False
    nll_full = np.zeros(total, dtype=np.float32)
    risk, probability, delta, divergence = (
        np.zeros((total, columns), dtype=np.float32) for _ in range(4)
    )
    agree = np.zeros((total, columns), dtype=np.bool_)
    by_length = sorted(rows, key=lambda i: len(states.documents[i]))
    for chosen in batches_of(states.documents, by_length, 4096):
        where = np.concatenate(
            [place[i] + np.arange(len(states.documents[i]) - first[i]) for i in chosen]
        )
        exited = []
        for column, head in enumerate(heads):
            batch = states.batch(chosen, head.layer_idx, shell.base.device)
            counted = predicting(batch)
            exited.append(exit_states(head, shell, batch)[counted])
            risk[where, column] = probes.risk(column, batch.states[counted]).cpu().numpy()
        # What full depth says is the same for all heads, and the larger half of the work.
        targets = batch.ids.roll(-1, 1)[counted]
        for part, full in _full(shell, batch.final[counted]):
            at = where[part]
            gold = targets[part, None]
            nll_full[at] = -full.gather(-1, gold).squeeze(-1).cpu().numpy()
            for column, state in enumerate(exited):
                logits = _exit_logits(shell, state[part])
                out = torch.log_softmax(logits / temperatures[column], -1)
                delta[at, column] = (full - out).gather(-1, gold).squeeze(-1).cpu().numpy()
                divergence[at, column] = (full.exp() * (full - out)).sum(-1).cpu().numpy()
                agree[at, column] = (full.argmax(-1) == out.argmax(-1)).cpu().numpy()
                chance = torch.softmax(logits[:, draft.to(out.device)], -1).amax(-1)
                probability[at, column] = chance.cpu().numpy()
    return Traces(
        checkpoints=tuple(head.layer_idx for head in heads),
        doc_offsets=offsets,
        eligible=eligible,
        nll_full=nll_full,
        risk=risk,
        probability=probability,
        delta_nll=delta,
        divergence=divergence,
        agree=agree,
    )


@torch.inference_mode()
def fit_temperatures(
    heads: Sequence[ExitHead],
    shell: BaseShell,
    states: BaseStates,
    rows: Sequence[int],
    draft: Tensor,
) -> list[float]:
    """The temperature at which each exit's distribution is nearest to that of full depth.

    Only tokens of which the exit is fairly sure count, since only those will leave.

    Args:
        heads: Exit heads in the order of their checkpoints.
        shell: Shell of the base.
        states: Recorded states.
        rows: Documents that the heads have not seen.
        draft: Draft vocabulary, token ids.

    Returns:
        One temperature a head, from a grid between 0.7 and 1.4.
    """
    grid = torch.linspace(0.7, 1.4, 15).tolist()
    ordered = sorted(rows, key=lambda i: len(states.documents[i]))
    cost = torch.zeros(len(heads), len(grid), dtype=torch.float64)
    for chosen in batches_of(states.documents, ordered, 2048):
        exited = []
        for head in heads:
            batch = states.batch(chosen, head.layer_idx, shell.base.device)
            counted = predicting(batch)
            exited.append(exit_states(head, shell, batch)[counted])
        for part, full in _full(shell, batch.final[counted]):
            for column, state in enumerate(exited):
                logits = _exit_logits(shell, state[part])
                chance = torch.softmax(logits[:, draft.to(logits.device)], -1).amax(-1)
                sure = chance >= _SURE
                p, own = full[sure].exp(), logits[sure]
                for place, temperature in enumerate(grid):
                    log_q = torch.log_softmax(own / temperature, -1)
                    cost[column, place] -= float((p * log_q).sum())
    return [round(grid[place], 3) for place in cost.argmin(-1).tolist()]


def predicting(batch: DocumentBatch) -> Tensor:
    """Positions that predict a token of the continuation, ``[rows, seq]``."""
    position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    start = batch.prompt_lengths.clamp_min(1)[:, None] - 1
    stop = batch.mask.sum(-1, keepdim=True) - 1
    return (position >= start) & (position < stop)


def _full(shell: BaseShell, final: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Log-probabilities at full depth, some tokens at a time."""
    for part, full in iter_logits(shell, final):
        yield part, torch.log_softmax(full.float(), -1)


def _exit_logits(shell: BaseShell, exited: Tensor) -> Tensor:
    """Logits of an exit's states, `[tokens, vocabulary]`."""
    return shell.logits(exited.to(shell.base.dtype).unsqueeze(0)).squeeze(0).float()
