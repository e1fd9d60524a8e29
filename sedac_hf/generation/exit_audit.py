"""Settled exits held against the base's own states, once their tails are run anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.exit_check import judged
from sedac_hf.core.exit_step import ExitStep, risks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.observers import ExitWatch
    from sedac_hf.core.row_pass import RowPass

__all__ = ["ExitAudit"]


@dataclass
class _Waiting:
    """Exits of one step that wait for their tail.

    Attributes:
        rows: Their rows, `[n]`.
        checkpoints: Where they left, `[n]`.
        risks: Risk at every checkpoint, completed as the tail is run, `[n, checkpoints]`.
        exits: States with which they left, `[n, 1, width]`.
    """

    rows: Tensor
    checkpoints: npt.NDArray[np.int64]
    risks: npt.NDArray[np.float32]
    exits: Tensor


class ExitAudit:
    """Holds exits that a watch picked against full depth; changes no token."""

    def __init__(
        self, run: RowPass, parts: ExitParts, watch: ExitWatch, temperatures: Sequence[float]
    ) -> None:
        """Begin with no exits.

        Args:
            run: Its heads say what the states mean.
            parts: What exits are made of.
            watch: Picks exits, and is told what became of them.
            temperatures: Temperature of each checkpoint.
        """
        self._run = run
        self._parts = parts
        self._watch = watch
        self._temperatures = list(temperatures)
        self._waiting: dict[int, _Waiting] = {}

    def note(self, node: int, step: ExitStep) -> None:
        """Pick exits of a step.

        Args:
            node: Which of the open nodes the step's tokens are.
            step: The step, its exits decided.
        """
        left = step.record.checkpoints >= 0
        if not left.any():
            return
        rows = self._watch.pick(left, runs_on=False)
        if rows.any():
            self._waiting[node] = _Waiting(
                torch.from_numpy(np.flatnonzero(rows)),
                step.record.checkpoints[rows],
                step.known_risks(rows),
                step.exit_states(rows),
            )

    @property
    def observed(self) -> list[int]:
        """Depths at which it is to be seen how evenly tokens attend, so that risks are known."""
        if not self._waiting:
            return []
        heads = self._parts.heads
        return [heads[k].layer_idx + 1 for k in self._watch.cascade.attentive]

    def passing(self, node: int, k: int, hidden: Tensor, spread: Tensor | None) -> None:
        """A node has come to a checkpoint: risks there that were not known become known.

        Args:
            node: The node.
            k: The checkpoint.
            hidden: States there, `[rows, 1, width]`.
            spread: How evenly the rows attend in its layer, `[rows]`; None if nobody looked.
        """
        waiting = self._waiting.get(node)
        if waiting is not None and np.isnan(waiting.risks[:, k]).any():
            rows = waiting.rows.to(hidden.device)
            seen = None if spread is None else spread[rows.to(spread.device)]
            found = risks_of(self._parts, self._watch.cascade, k, hidden[rows, 0], spread=seen)
            unknown = np.isnan(waiting.risks[:, k])
            waiting.risks[unknown, k] = found[unknown]

    def settle(self, finals: Sequence[Tensor]) -> None:
        """All tails were run.

        Args:
            finals: State of each open node after the last layer, `[rows, 1, width]` each.
        """
        if not self._waiting:
            return
        nodes = self._waiting.items()
        ends = [finals[node][each.rows.to(finals[node].device)] for node, each in nodes]
        self._watch.judge(
            judged(
                torch.cat([each.exits for each in self._waiting.values()]),
                torch.cat(ends),
                self._run.logits,
                np.concatenate([each.checkpoints for each in self._waiting.values()]),
                self._temperatures,
                np.concatenate([each.risks for each in self._waiting.values()]),
                share=self._watch.share(runs_on=False),
                left=True,
            )
        )
        self._waiting = {}
