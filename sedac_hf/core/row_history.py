"""How hard each row's text has been so far: what an adaptive decay follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sedac_hf.core.cascade_options import AdaptiveDecay
    from sedac_hf.core.session import StepRecord

__all__ = ["RowHistory"]

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class RowHistory:
    """Running means of one call, row by row; float32, as the replay has them.

    The entropy of a token's distribution is known where it went to full depth; the prompt's last
    position is the first of them. A row's figures depend on that row alone.
    """

    def __init__(self, rule: AdaptiveDecay, rows: int) -> None:
        """Begin before the first token.

        Args:
            rule: What is followed, and how.
            rows: Rows of the call.
        """
        self._rule = rule
        self._known = np.zeros(rows, np.bool_)
        self._entropy = np.zeros(rows, np.float32)
        self._success = np.zeros(rows, np.float32)

    @property
    def rows(self) -> int:
        """Rows that are followed."""
        return len(self._known)

    @property
    def uncertainty(self) -> FloatArray:
        """Running entropy as a share of the rule's scale, in [0, 1], `[rows]`; 0 at first."""
        share = np.clip(self._entropy / np.float32(self._rule.scale), 0, 1)
        return np.asarray(share, np.float32)

    @property
    def bonus(self) -> FloatArray:
        """The rule's bonus times the running share of tries that led to an exit, `[rows]`."""
        return (np.float32(self._rule.bonus) * self._success).astype(np.float32)

    def observe(self, record: StepRecord, logits: Tensor, rows: Mask | None = None) -> None:
        """Take note of a step.

        Args:
            record: What it decided.
            logits: What it said, `[rows, vocabulary]`; only rows of full depth are looked at.
            rows: Rows that are meant, `[rows]`; None for all.
        """
        full = record.checkpoints < 0
        tried = record.tries.any(axis=1)
        if rows is not None:
            full, tried = full & rows, tried & rows
        stays = np.float32(self._rule.momentum)
        fresh = np.float32(1) - stays
        if tried.any():
            left = (record.checkpoints >= 0).astype(np.float32)
            moved = stays * self._success + fresh * left
            self._success = np.where(tried, moved, self._success)
        if full.any():
            places = torch.from_numpy(np.flatnonzero(full)).to(logits.device)
            found = self._entropy.copy()
            found[full] = entropy_of(logits[places])
            moved = np.where(self._known, stays * self._entropy + fresh * found, found)
            self._entropy = np.where(full, moved, self._entropy)
            self._known = self._known | full


@torch.no_grad()
def entropy_of(logits: Tensor) -> FloatArray:
    """Entropy of distributions, nats.

    Args:
        logits: `[n, vocabulary]`.

    Returns:
        `[n]`, float32.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    # A word that cannot come has weight 0, not NaN; NaN logits stay NaN.
    spread = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p.exp() * log_p)
    return np.asarray((-spread.sum(-1)).cpu(), np.float32)
