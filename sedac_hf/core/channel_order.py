"""The order of an MLP's channels, by which soft exits keep the most important ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sedac_hf.core.mlp_channels import MlpChannels, channels_of, mlp_of
from sedac_hf.core.stand_ins import shallow_copy
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["CHANNELS_PREFIX", "ChannelOrder", "measure_order"]

CHANNELS_PREFIX = "channels."
# Tokens that the means are taken over, and of one forward at most.
_TOKENS, _LONGEST = 4096, 1024


@dataclass(frozen=True)
class ChannelOrder:
    """Channels of each layer's MLP, the most important first.

    Attributes:
        layers: One permutation per layer, `[channels]` int64.
    """

    layers: tuple[Tensor, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """The order as tensors ``channels.<layer>``, int16 where that is enough, else int32."""
        small = max(len(order) for order in self.layers) <= np.iinfo(np.int16).max
        dtype = torch.int16 if small else torch.int32
        return {f"{CHANNELS_PREFIX}{i}": order.to(dtype) for i, order in enumerate(self.layers)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_layers: int) -> ChannelOrder:
        """Inverse of `to_tensors`.

        Args:
            tensors: What `to_tensors` gave.
            num_layers: Layers of the base.

        Raises:
            ConfigError: If a layer is missing or too many, or holds no order of channels.
        """
        names = [f"{CHANNELS_PREFIX}{i}" for i in range(num_layers)]
        if set(names) != set(tensors):
            raise ConfigError(
                f"the order of channels must have one tensor for each of {num_layers} layers, "
                f"found {sorted(tensors)}."
            )
        layers = []
        for name in names:
            order = tensors[name].detach().cpu().flatten().to(torch.int64)
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise ConfigError(f"tensor {name!r} is no order of {len(order)} channels.")
            layers.append(order)
        return cls(tuple(layers))

    def check_fits(self, shell: BaseShell) -> None:
        """Refuse an order that was made for other MLPs.

        Args:
            shell: Shell of the base.

        Raises:
            ConfigError: If layers or channels are others.
            UnsupportedModelError: If the base has MLPs that soft exits cannot narrow.
        """
        found = [channels_of(mlp_of(layer), check=True).count for layer in shell.layers]
        expected = [len(order) for order in self.layers]
        if found != expected:
            raise ConfigError(
                f"the order is for MLPs of {expected} channels, those of the base have {found}."
            )


class _Listener:
    """Stands in for an MLP, and sums up the magnitudes of its channels on the way."""

    def __init__(self, channels: MlpChannels) -> None:
        self.channels = channels
        self.sum = torch.zeros(channels.count, dtype=torch.float64)

    def __call__(self, states: Tensor) -> Tensor:
        values = self.channels.values(states)
        self.sum += values.float().abs().flatten(0, -2).sum(0).double().cpu()
        return torch.nn.functional.linear(values, *self.channels.down)


@torch.no_grad()
def measure_order(
    shell: BaseShell, documents: Sequence[Document], *, tokens: int = _TOKENS
) -> ChannelOrder:
    """Order channels by their mean magnitude times the norm of their column on the way back.

    Args:
        shell: Shell of the base.
        documents: Calibration documents; the first ones are used, one at a time.
        tokens: About how many tokens to use.

    Returns:
        The order.

    Raises:
        ConfigError: If there are no documents.
        UnsupportedModelError: If the base has MLPs that soft exits cannot narrow.
    """
    if not documents:
        raise ConfigError("there are no documents to order channels by; pass at least one.")
    listeners = [_Listener(channels_of(mlp_of(layer), check=True)) for layer in shell.layers]
    heard = 0
    for document in documents:
        ids = torch.from_numpy(np.asarray(document.ids[:_LONGEST], np.int64))[None]
        hidden, calls = shell.prologue(input_ids=ids.to(shell.input_device), use_cache=False)
        for layer, call, listener in zip(shell.layers, calls, listeners, strict=True):
            listening: Any = shallow_copy(layer, {"mlp": listener})
            output = listening(hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        heard += ids.shape[1]
        if heard >= tokens:
            break
    return ChannelOrder(tuple(_order(listener, heard) for listener in listeners))


def _order(listener: _Listener, heard: int) -> Tensor:
    importance = listener.channels.importance((listener.sum / heard).float())
    return importance.cpu().argsort(descending=True, stable=True)
