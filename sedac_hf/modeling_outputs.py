"""What a forward of the wrapper returns when exits are simulated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["SedacOutput"]


@dataclass
class SedacOutput(CausalLMOutputWithPast):
    """Output of `SedacForCausalLM.forward(..., exits="simulate")`.

    Attributes:
        exit_layers: Layer each position left after, `[rows, seq]` int64; the number of layers where
            it did not leave.
        risks: Risk at each checkpoint, `[rows, seq, checkpoints]` float32; NaN where a position did
            not come.
        confidences: Normalised confidence there, same shape.
        probabilities: Largest probability of the exit there, same shape; NaN where it was not
            asked.
        soft_exits: Index of the checkpoint behind which each position ran on fewer channels,
            `[rows, seq]` int64; -1 where it did not. None without soft exits.
        kept_shares: Share of all MLPs' channels that each position ran, `[rows, seq]` float32; None
            without soft exits.
    """

    exit_layers: Tensor | None = None
    risks: Tensor | None = None
    confidences: Tensor | None = None
    probabilities: Tensor | None = None
    soft_exits: Tensor | None = None
    kept_shares: Tensor | None = None
