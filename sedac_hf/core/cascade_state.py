"""What the cascade knows of the rows of one decode step, and accumulates on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf.core.token_routing import UNKNOWN_CLASS, classes_of

if TYPE_CHECKING:
    from torch import Tensor

    from sedac_hf.core.fused_gates import Seen

__all__ = ["CascadeState", "StepContext", "begin_state"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepContext:
    """What is known of rows before the first checkpoint; rules use what they need of it.

    Attributes:
        before: Embeddings ``[rows, width]``, or states at the checkpoint before.
        tokens: Ids of the tokens that are being read, ``[rows]``.
        uncertainty: How hard each text has been so far, in [0, 1], ``[rows]``.
        bonus: What earlier exits that went well add to the decay, ``[rows]``.
    """

    before: Tensor | None = None
    tokens: npt.NDArray[np.int64] | None = None
    uncertainty: FloatArray | None = None
    bonus: FloatArray | None = None


@dataclass
class CascadeState:
    """What the cascade has accumulated in one decode step.

    Attributes:
        confidence: Accumulated confidence, not normalised, ``[rows]``.
        before: States at the last checkpoint that was asked, or embeddings, ``[rows, width]``.
        seen: What the last checkpoint has shown, where evidence is fused.
        classes: Classes of the tokens that are being read, ``[rows]``, where they matter.
        uncertainty: How hard each text has been, ``[rows]``, where the decay adapts.
        bonus: What earlier exits add to the decay, ``[rows]``, likewise.
        most: Greatest confidence so far that each row could have had, ``[rows]``, likewise.
    """

    confidence: FloatArray
    before: Tensor | None = None
    seen: Seen | None = None
    classes: npt.NDArray[np.uint8] | None = None
    uncertainty: FloatArray | None = None
    bonus: FloatArray | float = 0.0
    most: FloatArray | None = None


def begin_state(
    rows: int, context: StepContext, table: npt.NDArray[np.uint8] | None, adapts: bool
) -> CascadeState:
    """The state before the first checkpoint.

    Args:
        rows: Number of rows.
        context: What is known of them.
        table: Class of every token where rules differ by class; None where they do not.
        adapts: Whether the decay adapts; a row without a history keeps the plain one, bounded.
    """
    state = CascadeState(np.zeros(rows, np.float32), before=context.before)
    if table is not None:
        tokens = context.tokens
        unknown = np.full(rows, UNKNOWN_CLASS, np.uint8)
        state.classes = unknown if tokens is None else classes_of(table, tokens)
    if adapts:
        calm = np.zeros(rows, np.float32)
        state.uncertainty = calm if context.uncertainty is None else context.uncertainty
        state.bonus = calm if context.bonus is None else context.bonus
        state.most = np.zeros(rows, np.float32)
    return state
