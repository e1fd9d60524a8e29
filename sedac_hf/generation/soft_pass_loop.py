"""Decoding over a pass with soft exits: every layer runs at once, so that nothing waits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sedac_hf.core.session import StepRecord
from sedac_hf.core.soft_loop import SoftStep
from sedac_hf.generation.settle_loop import SettleLoop

__all__ = ["SoftPassLoop"]


class SoftPassLoop(SettleLoop):
    """Decodes a batch, one token per row and step; each row keeps channels of its own number."""

    def _step(self, acts: bool) -> tuple[Tensor, StepRecord]:
        """Each row's state for the final norm, and what was decided."""
        run, state, parts = self._run, self._state, self._parts
        assert self._session.cascade is not None
        rows, depth = state.rows, parts.shell.num_layers
        nothing = np.zeros((rows, 1), np.int64)
        tokens = torch.from_numpy(self._tokens[:, None].copy())
        hidden = run.embed(tokens, state.positions(state.length, nothing))
        at = state.place(nothing, np.ones((rows, 1, 1), np.bool_))
        record = StepRecord.full_depth(rows, depth, len(parts.heads))
        if acts:
            step = SoftStep(parts, self._session.cascade, record, ~self._texts.done)
            layer = 0
            for k, head in enumerate(parts.heads):
                stop, spread = head.layer_idx + 1, step.spread_at(k)
                hidden = run.layers(hidden, at, layer, stop, step.kept, spread)
                layer = stop
                step.ask(k, hidden, None if spread is None else spread.flat)
            hidden = run.layers(hidden, at, layer, depth, step.kept)
            record = step.finish()
        else:
            hidden = run.layers(hidden, at, 0, depth)
        state.length = state.length + 1
        self.tails += int((~self._texts.done).sum())
        return hidden, record
