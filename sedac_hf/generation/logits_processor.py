"""The wrapper's logits processor: temperature of exits, and the record of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor

from sedac_hf.generation.row_ends import rows_going

if TYPE_CHECKING:
    from sedac_hf.core.session import ExitSession

__all__ = ["SedacLogitsProcessor", "scale_exits"]


class SedacLogitsProcessor(LogitsProcessor):
    """Commits what the last forward decided, and cools or warms the logits of exits.

    The wrapper installs it before all other processors, so that these see calibrated logits.
    """

    supports_continuous_batching = True

    def __init__(self, session: ExitSession, num_layers: int, num_checkpoints: int) -> None:
        """Work for one call of `generate`.

        Args:
            session: The call.
            num_layers: Decoder layers of the base.
            num_checkpoints: Checkpoints of the model.
        """
        self._session = session
        self._num_layers = num_layers
        self._num_checkpoints = num_checkpoints
        cascade = session.cascade
        layers = () if cascade is None else cascade.config.layers
        self._temperatures = [layer.temperature for layer in layers]

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """Record the step and scale the rows that left early.

        Args:
            input_ids: Tokens so far, `[rows, seq]`.
            scores: Logits or log-probabilities of the next token, `[rows, vocabulary]`.

        Returns:
            Scores, same shape.
        """
        session = self._session
        if session.prompt_length is None:
            session.prompt_length = input_ids.shape[1]
        meter = session.meter if session.meter is not None and session.meter.live else None
        live = None
        if meter is not None or session.observers:
            new = input_ids[:, session.prompt_length :]
            going = rows_going(new, session.eos_tokens)
            live = going[:, -1]
            if meter is not None and new.shape[1]:
                meter.release(new[:, -1], going[:, -2])
        record = session.commit(scores.shape[0], self._num_layers, self._num_checkpoints, live)
        session.note(record, scores)
        if meter is not None:
            meter.hold(record)
        scaled = scale_exits(scores, record.checkpoints, self._temperatures)
        return cast(FloatTensor, scaled)


def scale_exits(
    scores: Tensor, checkpoints: npt.NDArray[np.int64], temperatures: Sequence[float]
) -> Tensor:
    """Divide the scores of exits by the temperature of their checkpoint.

    What normalises a row stays as it was, so that log-probabilities (which beam search hands over)
    stay log-probabilities.

    Args:
        scores: `[..., vocabulary]`.
        checkpoints: Checkpoint each leading position left at, `[...]`; -1 where it did not.
        temperatures: One per checkpoint.

    Returns:
        Scores, same shape; the very same tensor when there is nothing to scale.
    """
    if all(temperature == 1.0 for temperature in temperatures) or (checkpoints < 0).all():
        return scores
    factors = np.array([*temperatures, 1.0], np.float32)[checkpoints]  # -1 picks the last, 1
    scaled = scores / torch.from_numpy(factors).to(scores.device, scores.dtype).unsqueeze(-1)
    before, after = scores.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True)
    left = torch.from_numpy(checkpoints >= 0).to(scores.device).unsqueeze(-1)
    return torch.where(left, scaled - after + before, scores)
