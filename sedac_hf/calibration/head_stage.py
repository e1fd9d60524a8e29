"""The stage of `fit` that trains heads: each process its share, further when time allows."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.head_schedule import HeadReport, HeadSchedule, head_learning_rate
from sedac_hf.calibration.head_training import train_head
from sedac_hf.core.exit_heads import build_exit_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sedac_hf.calibration.fit_splits import Splits
    from sedac_hf.calibration.fit_stages import FitRun
    from sedac_hf.calibration.states import BaseStates
    from sedac_hf.core.exit_heads import ExitHead

__all__ = ["train_heads"]

_HEADS_UNTIL = 0.67  # share of the time budget up to the end of this stage
_FURTHER = 0.5  # of the learning rate, for a head that is trained already


def train_heads(run: FitRun, states: BaseStates, splits: Splits) -> tuple[list[ExitHead], Tensor]:
    """Train what a budget as large as this one has not trained yet, and load it all.

    A head that was trained under a smaller budget is trained further from where it is, on the same
    documents: none of them ever moves from one split to another.

    Args:
        run: The fit.
        states: The base's states.
        splits: The documents by purpose.

    Returns:
        The heads, and the draft vocabulary's token ids.
    """
    settings, workspace, process = run.settings, run.workspace, run.process
    config = run.base.config.get_text_config()
    with process.main_process_first():
        draft = workspace.draft_vocabulary(
            lambda: _draft_vocabulary(
                states, splits.train, int(config.vocab_size), settings.draft_words
            )
        )
    heads = [build_exit_head(spec, run.shell).float().to(run.base.device) for spec in run.specs]
    rate = settings.learning_rate or head_learning_rate(int(config.hidden_size))
    mine = heads[process.process_index :: process.num_processes]
    for place, head in enumerate(mine):
        if workspace.has_head(head.spec, settings.budget_seconds):
            continue
        before = workspace.load_head(head) if workspace.has_head(head.spec) else None
        left = run.deadline(_HEADS_UNTIL) - time.monotonic()
        schedule = HeadSchedule(
            seconds=max(left / (len(mine) - place), 10.0),
            batch_tokens=run.sizes.step_tokens,
            epochs=settings.epochs,
            learning_rate=rate if before is None else _FURTHER * rate,
            seed=settings.seed + (0 if before is None else before.steps),
        )
        kept = workspace.head_progress(head.spec, schedule.seed)
        trained = train_head(
            head, run.shell, states, splits.train, splits.search, draft, schedule,
            kept=kept, progress=run.progress,
        )  # fmt: skip
        workspace.save_head(head, _in_all(before, trained), settings.budget_seconds)
        kept.remove()
    process.wait_for_everyone()
    for head in heads:
        run.report.heads.append(workspace.load_head(head))
        head.requires_grad_(False).eval()
    return heads, draft


def _in_all(before: HeadReport | None, after: HeadReport) -> HeadReport:
    """What training came to, with what had gone before."""
    if before is None:
        return after
    return replace(
        after,
        steps=before.steps + after.steps,
        tokens=before.tokens + after.tokens,
        seconds=before.seconds + after.seconds,
    )


def _draft_vocabulary(
    states: BaseStates, rows: Sequence[int], vocabulary: int, words: int
) -> Tensor:
    """The words to which the base gives most probability on the training texts, sorted by id."""
    mass = states.token_mass(rows, vocabulary)
    best = np.argsort(-mass, kind="stable")[: min(words, vocabulary)]
    return torch.from_numpy(np.sort(best).astype(np.int64))
