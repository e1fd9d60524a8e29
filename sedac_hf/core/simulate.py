"""The exit rule over whole sequences at once, position by position as generation applies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sedac_hf.core.decoder_loop import ExitParts, checkpoint_decision, top_probability

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import LayerCall
    from sedac_hf.core.cascade_controller import CascadeController

__all__ = ["SimulateLoop"]


class SimulateLoop:
    """A loop for the base shell in which every position follows the rule of decoding.

    Positions that leave keep their state from there on, so that deeper layers see the K/V which
    `propagate` would have written.

    Attributes:
        layers: Layer each position left after, `[rows, seq]`; the depth where it did not leave.
        checkpoints: Index of the checkpoint it left at, -1 where it did not.
        risks: Risk at each checkpoint, `[rows, seq, checkpoints]`; NaN where it was not asked.
        confidences: Normalised confidence there, same shape.
        probabilities: Largest probability of the exit there; NaN where it was not tried.
    """

    def __init__(
        self, parts: ExitParts, cascade: CascadeController, eligible: np.ndarray[tuple[int, int]]
    ) -> None:
        """Prepare one forward.

        Args:
            parts: What exits are made of.
            cascade: Decides who leaves.
            eligible: Positions that may leave, `[rows, seq]` of bool.
        """
        self._parts = parts
        self._cascade = cascade
        self._eligible = eligible
        rows, seq = eligible.shape
        count = len(parts.heads)
        self.layers = np.full((rows, seq), parts.shell.num_layers, np.int64)
        self.checkpoints = np.full((rows, seq), -1, np.int64)
        self.risks = np.full((rows, seq, count), np.nan, np.float32)
        self.confidences = np.full((rows, seq, count), np.nan, np.float32)
        self.probabilities = np.full((rows, seq, count), np.nan, np.float32)

    def __call__(self, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """Run the layers.

        Args:
            hidden: Embeddings `[rows, seq, width]`.
            calls: One recorded call per layer, without a cache.

        Returns:
            States for the base's final norm, same shape.
        """
        parts = self._parts
        rows, seq, width = hidden.shape
        state = self._cascade.start(rows * seq)
        active = self._eligible.copy()
        exits: Tensor | None = None
        left: Tensor | None = None
        at = 0
        for k, head in enumerate(parts.heads):
            stop = head.layer_idx + 1
            hidden = parts.passes.run(hidden, calls, at, stop, left)
            at = stop
            states = hidden.reshape(rows * seq, width)
            risk, confidence, tries = (
                array.reshape(rows, seq)
                for array in checkpoint_decision(
                    parts, self._cascade, k, states, state, active.reshape(-1)
                )
            )
            self.risks[..., k] = np.where(active, risk, np.nan)
            self.confidences[..., k] = np.where(active, confidence, np.nan)
            tries = tries & active
            if not tries.any():
                continue
            found = parts.apply_head(k, hidden, calls, None, None)
            leaving = self._sure_enough(k, found, tries)
            if not leaving.any():
                continue
            active &= ~leaving
            self.layers[leaving] = head.layer_idx
            self.checkpoints[leaving] = k
            now = torch.from_numpy(leaving).to(found.device).unsqueeze(-1)
            exits = found if exits is None else torch.where(now, found, exits.to(found.device))
            left = torch.from_numpy(self.checkpoints >= 0).to(found.device).unsqueeze(-1)
        hidden = parts.passes.run(hidden, calls, at, len(calls), left)
        if exits is None or left is None:
            return hidden
        return torch.where(left.to(hidden.device), exits.to(hidden.device), hidden)

    def _sure_enough(
        self, k: int, found: Tensor, tries: np.ndarray[tuple[int, int]]
    ) -> np.ndarray[tuple[int, int]]:
        """Those positions that try and whose exit gives some word enough probability."""
        least = self._cascade.config.layers[k].min_probability
        if least <= 0:
            return tries
        rows, columns = np.nonzero(tries)
        # Only positions that try need logits.
        picked = found[torch.from_numpy(rows), torch.from_numpy(columns)].unsqueeze(0)
        probability = top_probability(self._parts, picked)[0]
        self.probabilities[rows, columns, k] = probability
        leaving = tries.copy()
        leaving[rows, columns] = probability >= least
        return leaving
