"""What is known of each traced token beside its exits: what is read there, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.calibration.documents import batches_of
from sedac_hf.calibration.measurement import predicting
from sedac_hf.calibration.states import BaseStates, DocumentBatch
from sedac_hf.core.estimators import Observation, TokenConsistencyEstimator

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead

__all__ = ["TokenFacts", "collect_facts"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenFacts:
    """One row for each row of the traces of the same documents, T rows, K checkpoints.

    Attributes:
        tokens: Token that is read at the position, ``[T]``.
        entropy: Entropy of the full depth there, nats, ``[T]``.
        consistency: How far the state has turned since the checkpoint before, ``[T, K]``; since the
            embedding at the first one.
        attention: How evenly the checkpoint's layer attends, ``[T, K]``; NaN at the embedding, and
            where the base's attention does not say.
    """

    tokens: npt.NDArray[np.int64]
    entropy: FloatArray
    consistency: FloatArray
    attention: FloatArray

    def of_tokens(self, rows: npt.NDArray[np.bool_]) -> TokenFacts:
        """Those of some tokens.

        Args:
            rows: Which, ``[T]``.
        """
        return TokenFacts(**{name: array[rows] for name, array in vars(self).items()})


@torch.inference_mode()
def collect_facts(
    heads: Sequence[ExitHead], shell: BaseShell, states: BaseStates, rows: Sequence[int]
) -> TokenFacts:
    """Facts of the continuation tokens of some documents.

    Args:
        heads: Exit heads in the order of their checkpoints.
        shell: Shell of the base.
        states: Recorded states.
        rows: Documents, taken in the order of traces of the same rows.

    Returns:
        The facts.
    """
    turn = TokenConsistencyEstimator()
    tokens, entropy, consistency, attention = [], [], [], []
    for chosen in batches_of(states.documents, rows, 4096):
        before: Tensor | None = None
        columns, spreads = [], []
        for head in heads:
            batch = states.batch(chosen, head.layer_idx)
            counted = predicting(batch)
            now = batch.states[counted]
            if before is None:
                before = now if head.layer_idx < 0 else _embedded(shell, batch)[counted]
            columns.append(turn.risk(Observation(now, before)).float().numpy())
            spreads.append(batch.spread[counted].numpy())
            before = now
        consistency.append(np.stack(columns, axis=1))
        attention.append(np.stack(spreads, axis=1))
        tokens.append(batch.ids[counted].numpy())
        entropy.append(batch.entropy[counted].numpy())
    return TokenFacts(*map(np.concatenate, (tokens, entropy, consistency, attention)))


def _embedded(shell: BaseShell, batch: DocumentBatch) -> Tensor:
    """What the first layer is given, ``[rows, seq, width]``."""
    device = shell.base.device
    hidden, _ = shell.prologue(
        input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False
    )
    return hidden.float().cpu()
