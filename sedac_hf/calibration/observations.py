"""What a call tells online calibration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sedac_hf.core.observers import JudgedExits

__all__ = ["Observations"]

FloatArray = npt.NDArray[np.float32]


@dataclass
class Observations:
    """What a call has seen since it last reported.

    Attributes:
        tokens: Tokens generated.
        passed: Tokens whose exits, at any checkpoint, were or might have been looked at.
        passed_at: The same for one checkpoint alone.
        risks: Checkpoint, risks `[n]` there, and tokens that each stands for.
        rows: Risks at all checkpoints of some tokens, `[n, checkpoints]`, as often as they stand
            for others.
        judged: Exits held against full depth.
        plain: Seconds and number of steps without exits.
        steps: Seconds and number of all steps under the rules.
    """

    tokens: int = 0
    passed: float = 0.0
    passed_at: dict[int, float] = field(default_factory=dict)
    risks: list[tuple[int, FloatArray, float]] = field(default_factory=list)
    rows: list[FloatArray] = field(default_factory=list)
    judged: list[JudgedExits] = field(default_factory=list)
    plain: tuple[float, int] = (0.0, 0)
    steps: tuple[float, int] = (0.0, 0)
