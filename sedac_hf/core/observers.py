"""Who may look on while tokens are generated: a seam for metrics and for online calibration.

`ExitSession.commit` calls `observe` of every observer of the call once per step, in certified and
plain mode, whatever loop decodes: when the forward is done and before the next token is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CascadeController
    from sedac_hf.core.session import StepRecord

__all__ = ["ExitWatch", "JudgedExits", "StepObserver"]

Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


class StepObserver(Protocol):
    """Is told of every step of one call."""

    def observe(self, record: StepRecord, live: Mask | None) -> None:
        """A step was made.

        Args:
            record: What it decided for each row; not to be changed.
            live: Rows whose text still goes on, `[rows]`; None for all.
        """
        ...

    def end(self) -> None:
        """The call is over, or was broken off."""
        ...


@dataclass(frozen=True)
class JudgedExits:
    """Exits that were held against what full depth says at the same position.

    Attributes:
        checkpoints: Checkpoint of each exit, `[exits]`.
        risks: Risk at every checkpoint, `[exits, checkpoints]`; NaN where it is not known.
        divergence: KL divergence of the exit from full depth, nats, `[exits]`.
        agree: Whether both have the same first choice, `[exits]`.
        share: Chance that each exit had of being looked at.
        left: Whether they left in fact; else they would have, and were run on.
    """

    checkpoints: npt.NDArray[np.int64]
    risks: FloatArray
    divergence: npt.NDArray[np.float64]
    agree: Mask
    share: float
    left: bool


class ExitWatch(StepObserver, Protocol):
    """An observer that also says by which rules tokens leave, and which exits are looked at."""

    @property
    def cascade(self) -> CascadeController:
        """The rules from the next step on."""
        ...

    def look(self) -> CascadeController | None:
        """Ask before a step whether it is to run at full depth; rules that are only looked at."""
        ...

    def pick(self, leaving: Mask, *, runs_on: bool) -> Mask:
        """Choose among exits those to be held against full depth.

        Args:
            leaving: Rows that leave, `[rows]`.
            runs_on: Whether those chosen must run on for it, and thus do not leave.

        Returns:
            Rows chosen, `[rows]`.
        """
        ...

    def judge(self, exits: JudgedExits) -> None:
        """Take note of exits that were held against full depth."""
        ...

    def share(self, *, runs_on: bool) -> float:
        """Chance with which `pick` chooses each."""
        ...

    def verified(self, k: int, risks: FloatArray) -> None:
        """Take note of tokens that exact mode verified.

        Args:
            k: Checkpoint of the head that drafts.
            risks: Risk there of each token, `[tokens]`.
        """
        ...
