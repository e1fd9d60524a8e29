"""Holding exits against what full depth says at the same positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.observers import JudgedExits

if TYPE_CHECKING:
    from sedac_hf.core.exit_step import ExitStep
    from sedac_hf.core.observers import ExitWatch

__all__ = ["check_step", "divergence_of", "hold_by", "judged", "still_live"]

Mask = npt.NDArray[np.bool_]


def divergence_of(
    exits: Tensor, full: Tensor, temperatures: Sequence[float] | npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], Mask]:
    """KL divergence of exits from full depth: ``sum_w p_w (ln p_w - ln q_w)``, p of full depth.

    Args:
        exits: Logits of the exits, `[n, vocabulary]`.
        full: Logits of full depth, same shape.
        temperatures: What each exit's logits are divided by, `[n]`.

    Returns:
        Divergences in nats and whether both have the same first choice, `[n]` each.
    """
    scale = torch.as_tensor(temperatures, dtype=torch.float32).to(exits.device).view(-1, 1)
    log_q = torch.log_softmax(exits.float() / scale, -1)
    log_p = torch.log_softmax(full.float(), -1)
    found = (log_p.exp() * (log_p - log_q)).sum(-1)
    agree = log_p.argmax(-1) == log_q.argmax(-1)
    return found.double().cpu().numpy(), agree.cpu().numpy()


@torch.no_grad()
def judged(
    exits: Tensor,
    finals: Tensor,
    logits: Callable[[Tensor], Tensor],
    checkpoints: npt.NDArray[np.int64],
    temperatures: Sequence[float],
    risks: npt.NDArray[np.float32],
    *,
    share: float,
    left: bool,
) -> JudgedExits:
    """Compare states for the final norm.

    Args:
        exits: States of the exits, `[n, 1, width]`.
        finals: The base's own at the same positions, same shape.
        logits: The base's norm and head.
        checkpoints: Checkpoint of each exit, `[n]`.
        temperatures: Temperature of each checkpoint.
        risks: Risk at every checkpoint, `[n, checkpoints]`.
        share: Chance that each had of being looked at.
        left: Whether they left in fact.
    """
    both = logits(torch.cat([exits.to(finals.device, finals.dtype), finals]))[:, 0]
    scale = np.array(temperatures, np.float32)[checkpoints]
    divergence, agree = divergence_of(both[: len(exits)], both[len(exits) :], scale)
    return JudgedExits(checkpoints, risks, divergence, agree, share, left)


def hold_by(watch: ExitWatch, live: Mask | None) -> Callable[[Mask], Mask]:
    """Lets a watch pick exits that are run on.

    Args:
        watch: The watch.
        live: Rows whose text goes on, `[rows]`; None for all.
    """
    return lambda leaving: watch.pick(still_live(leaving, live), runs_on=True)


def still_live(rows: Mask, live: Mask | None) -> Mask:
    """Those rows whose text goes on.

    Args:
        rows: Rows, `[rows]`.
        live: Rows whose text went on at the last step; of another number it says nothing.
    """
    return rows if live is None or live.shape != rows.shape else rows & live


def check_step(
    step: ExitStep,
    rows: Mask,
    hidden: Tensor,
    logits: Callable[[Tensor], Tensor],
    temperatures: Sequence[float],
    watch: ExitWatch,
) -> None:
    """Hold exits of a step whose rows have all been run to the end against that end.

    Args:
        step: The step, whose exits were held back or left.
        rows: Which rows' exits, `[rows]`.
        hidden: States after the last layer, `[rows, 1, width]`.
        logits: The base's norm and head.
        temperatures: Temperature of each checkpoint.
        watch: Told of the result.
    """
    if not rows.any():
        return
    held = step.held[rows] >= 0
    places = torch.from_numpy(np.flatnonzero(rows)).to(hidden.device)
    checkpoints = np.where(held, step.held[rows], step.record.checkpoints[rows])
    runs_on = bool(held.all())
    watch.judge(
        judged(
            step.exit_states(rows), hidden[places], logits, checkpoints, temperatures,
            step.known_risks(rows), share=watch.share(runs_on=runs_on), left=not runs_on,
        )
    )  # fmt: skip
