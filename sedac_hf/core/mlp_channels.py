"""MLPs as channels: what each holds, how much each matters, and the MLP on some of them.

A channel is one number between an MLP's first and last projection. Recognition goes by structure
and is then settled by numbers: an MLP that computes something else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sedac_hf.core.weights import has_no_hooks, is_plain_tensor
from sedac_hf.errors import UnsupportedModelError

__all__ = ["MlpChannels", "channels_of", "mlp_of"]

# First and last projection of MLPs without a gate.
_PAIRS = (
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class MlpChannels:
    """An MLP, or some of its channels.

    Attributes:
        gate: Weights `[channels, width]` and bias of what is activated; None without a gate, where
            `up` is activated.
        up: Likewise, of what is gated.
        down: Weights `[width, channels]` and bias of the way back.
        activation: The activation.
    """

    gate: tuple[Tensor, Tensor | None] | None
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    activation: Callable[[Tensor], Tensor]

    @property
    def count(self) -> int:
        """Number of channels."""
        return int(self.up[0].shape[0])

    @property
    def tensors(self) -> list[Tensor]:
        """All weights and biases."""
        pairs = [self.up, self.down, *([] if self.gate is None else [self.gate])]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    def values(self, states: Tensor) -> Tensor:
        """What the channels hold, `[..., channels]`, for states `[..., width]`."""
        up = functional.linear(states, *self.up)
        if self.gate is None:
            return self.activation(up)
        return self.activation(functional.linear(states, *self.gate)) * up

    def __call__(self, states: Tensor) -> Tensor:
        """The MLP on these channels, `[..., width]`."""
        return functional.linear(self.values(states), *self.down)

    def importance(self, magnitude: Tensor) -> Tensor:
        """Mean magnitude of each channel times the norm of its column on the way back.

        Args:
            magnitude: Mean of the absolute values, `[channels]`.

        Returns:
            `[channels]`, float32.
        """
        norms = self.down[0].float().square().sum(dim=0).sqrt()
        return magnitude.float() * norms.to(magnitude.device)

    def ordered(self, order: Tensor) -> MlpChannels:
        """A copy whose channels stand in another order.

        Args:
            order: Channels, first to last, `[channels]`.
        """
        rows = order.to(self.up[0].device)

        def picked(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            weight, bias = pair
            return weight[rows].contiguous(), None if bias is None else bias[rows]

        weight, bias = self.down
        return MlpChannels(
            gate=None if self.gate is None else picked(self.gate),
            up=picked(self.up),
            down=(weight[:, rows].contiguous(), bias),
            activation=self.activation,
        )

    def first(self, count: int) -> MlpChannels:
        """The first channels, without a copy.

        Args:
            count: How many.
        """

        def picked(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            weight, bias = pair
            return weight[:count], None if bias is None else bias[:count]

        weight, bias = self.down
        return MlpChannels(
            gate=None if self.gate is None else picked(self.gate),
            up=picked(self.up),
            down=(weight[:, :count], bias),
            activation=self.activation,
        )


def mlp_of(layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer.

    Raises:
        UnsupportedModelError: If the layer keeps none under `mlp`.
    """
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no module `mlp`, so soft exits cannot narrow it. Use the "
            "strategy 'hard' for this base."
        )
    return mlp


@torch.no_grad()
def channels_of(mlp: nn.Module, *, check: bool = False) -> MlpChannels:
    """An MLP by its channels; its weights are shared, not copied.

    Args:
        mlp: Gated (`gate_proj`, `up_proj` or both in `gate_up_proj`, then `down_proj`), or of two
            projections with an activation between them.
        check: Whether to run a few states through it both ways.

    Returns:
        Its channels.

    Raises:
        UnsupportedModelError: If it is built otherwise, carries hooks or adapters, is quantised, or
            computes something else.
    """
    found = _by_structure(mlp)
    if found is None or not has_no_hooks(mlp):
        raise UnsupportedModelError(
            f"{type(mlp).__name__} is no MLP of plain projections (gate_proj, up_proj and "
            "down_proj, or two projections around an activation, without hooks, adapters or "
            "quantisation), so soft exits cannot narrow it. Use the strategy 'hard' for this base."
        )
    if check:
        _compare(mlp, found)
    return found


def _by_structure(mlp: nn.Module) -> MlpChannels | None:
    activation = next((a for name in _ACTIVATIONS if callable(a := getattr(mlp, name, None))), None)
    if activation is None:
        return None
    down = _projection(getattr(mlp, "down_proj", None))
    both = _projection(getattr(mlp, "gate_up_proj", None))
    gate = _projection(getattr(mlp, "gate_proj", None))
    up = _projection(getattr(mlp, "up_proj", None))
    if both is not None and down is not None:
        gate, up = _halves(both)
        return MlpChannels(gate, up, down, activation)
    if gate is not None and up is not None and down is not None:
        return MlpChannels(gate, up, down, activation)
    if hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"):
        return None
    for first, last in _PAIRS:
        up, down = _projection(getattr(mlp, first, None)), _projection(getattr(mlp, last, None))
        if up is not None and down is not None:
            return MlpChannels(None, up, down, activation)
    return None


def _projection(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[outputs, inputs]` and bias of a plain projection; None for anything else."""
    if not isinstance(module, (nn.Linear, Conv1D)) or not has_no_hooks(module):
        return None
    weight, bias = cast("Tensor | None", module.weight), cast("Tensor | None", module.bias)
    others = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    if weight is None or others or not is_plain_tensor(weight):
        return None
    if bias is not None and not is_plain_tensor(bias):
        return None
    weight = weight.detach()
    weight = weight.T if isinstance(module, Conv1D) else weight
    return weight, None if bias is None else bias.detach()


def _halves(
    pair: tuple[Tensor, Tensor | None],
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    (first, second), bias = pair[0].chunk(2), pair[1]
    biases = (None, None) if bias is None else bias.chunk(2)
    return (first, biases[0]), (second, biases[1])


def _compare(mlp: nn.Module, found: MlpChannels) -> None:
    """Refuse an MLP that does more than its parts say, such as a factor between them."""
    weight = found.up[0]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((1, 3, weight.shape[1]), generator=generator)
    states = states.to(weight.device, weight.dtype)
    expected = mlp(states)
    if isinstance(expected, Tensor):
        gap, scale = (found(states) - expected).float().norm(), expected.float().norm()
        if bool(gap <= _TOLERANCE[weight.dtype] * scale):
            return
    raise UnsupportedModelError(
        f"{type(mlp).__name__} computes something else than its projections and its activation, "
        "so soft exits cannot narrow it. Use the strategy 'hard' for this base."
    )
