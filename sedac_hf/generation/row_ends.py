"""Where each row's text ends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["rows_going"]


def rows_going(new: Tensor, eos_tokens: Tensor | None) -> npt.NDArray[np.bool_]:
    """Whether each row's text still goes on before each of its new tokens, and behind them all.

    A token before which its row goes on belongs to the text, the end token included.

    Args:
        new: New tokens, `[rows, new]`.
        eos_tokens: Tokens that end a row, or None.

    Returns:
        `[rows, new + 1]`; the last column is behind the last token.
    """
    going = np.ones((new.shape[0], new.shape[1] + 1), np.bool_)
    if eos_tokens is not None:
        ends = torch.isin(new, eos_tokens.to(new.device)).cpu().numpy()
        going[:, 1:] = ~np.logical_or.accumulate(ends, axis=1)
    return going
