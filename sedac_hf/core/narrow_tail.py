"""Decoder layers on the most important channels of their MLPs: what soft exits run."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedac_hf.core.exit_strategy import WIDTHS, SoftExit
from sedac_hf.core.mlp_channels import MlpChannels, channels_of, mlp_of
from sedac_hf.core.stand_ins import shallow_copy
from sedac_hf.core.weights import WeightWatch

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.channel_order import ChannelOrder

__all__ = ["KeptChannels", "NarrowTail", "channels_kept"]

Eighths = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


_VERSIONS = itertools.count(1)


def channels_kept(count: int, eighths: int) -> int:
    """Channels that `eighths` eighths of `count` are, rounded up."""
    return -(-count * eighths // WIDTHS)


class KeptChannels:
    """How many eighths of its channels each layer's MLP keeps for each token.

    Attributes:
        eighths: `[layers, ...]`, the tokens in any shape behind the layers.
    """

    def __init__(self, num_layers: int, shape: tuple[int, ...]) -> None:
        """Keep everything, for tokens of a shape."""
        self.eighths = np.full((num_layers, *shape), WIDTHS, np.uint8)

    def narrow(
        self, strategy: SoftExit, layer_idx: int, tokens: Mask, confidence: FloatArray
    ) -> None:
        """Let some tokens keep less from a checkpoint on.

        Args:
            strategy: Says how much.
            layer_idx: Layer of the checkpoint.
            tokens: Which tokens, in their shape.
            confidence: Confidences there, same shape.
        """
        sure = confidence[tokens].astype(np.float64)
        found = strategy.kept(sure, layer_idx, len(self.eighths))
        self.eighths[layer_idx + 1 :, tokens] = found

    @property
    def share(self) -> FloatArray:
        """Share of all MLPs' channels that each token keeps, in the tokens' shape."""
        return np.asarray(self.eighths.mean(axis=0) / WIDTHS, np.float32)


class NarrowTail:
    """The base's layers with narrower MLPs, from one copy of their weights in the order's order.

    The copy of a layer is made when it is first needed.

    Attributes:
        version: Differs between states of the weights, and between objects.
    """

    def __init__(self, shell: BaseShell, order: ChannelOrder) -> None:
        """Remember the order; nothing is copied yet.

        Args:
            shell: Shell of the base.
            order: The order of the channels, which fits the base.
        """
        self._shell = shell
        self._order = order
        self._ordered: dict[int, MlpChannels] = {}
        self._watch: WeightWatch | None = None
        self.version = 0
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Forget the copies if the base's weights have changed since.

        Raises:
            ConfigError: If the order was made for other MLPs.
            UnsupportedModelError: If the base has MLPs that cannot be narrowed, or no longer.
        """
        mlps = [mlp_of(layer) for layer in self._shell.layers]
        for mlp in mlps:
            channels_of(mlp)  # refuses adapters and hooks that came since
        weights = [parameter for mlp in mlps for parameter in mlp.parameters()]
        with self._lock:
            if self._watch is None or not self._watch.unchanged(weights):
                self._order.check_fits(self._shell)
                self._ordered = {}
                self._watch = WeightWatch(weights)
                self.version = next(_VERSIONS)

    def ordered(self, i: int) -> MlpChannels:
        """All channels of layer `i`, the most important first."""
        found = self._ordered.get(i)
        if found is None:
            with self._lock:
                mlp = mlp_of(self._shell.layers[i])
                found = channels_of(mlp).ordered(self._order.layers[i])
                self._ordered[i] = found
        return found

    def counts(self, kept: KeptChannels, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Channels that each token keeps in layers `start` to `stop - 1`, `[layers, tokens]`."""
        eighths = kept.eighths[start:stop].reshape(stop - start, -1).astype(np.int64)
        channels = np.array([len(order) for order in self._order.layers[start:stop]], np.int64)
        return -(-channels[:, None] * eighths // WIDTHS)

    def layer(self, i: int, eighths: Eighths) -> Any:
        """Layer `i`, for tokens that keep so much of its MLP.

        Args:
            i: Index of the layer.
            eighths: One number per token, in any shape.

        Returns:
            The very layer where nobody keeps less than all, else a stand-in.
        """
        layer = self._shell.layer_list[i]
        if (eighths == WIDTHS).all():
            return layer
        mlp = _NarrowMlp(mlp_of(layer), self.ordered(i), eighths.reshape(-1))
        return shallow_copy(layer, {"mlp": mlp})


class _NarrowMlp:
    """Stands in for an MLP in one forward: products of as many channels as each token keeps."""

    def __init__(self, whole: nn.Module, ordered: MlpChannels, eighths: Eighths) -> None:
        self._whole = whole
        self._ordered = ordered
        self._eighths = eighths

    def __call__(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        widths = np.unique(self._eighths).tolist()
        if len(widths) == 1:
            return self._run(flat, widths[0]).view(states.shape)
        out = torch.empty_like(flat)
        for width in widths:
            rows = torch.from_numpy(np.flatnonzero(self._eighths == width)).to(flat.device)
            out[rows] = self._run(flat[rows], width)
        return out.view(states.shape)

    def _run(self, states: Tensor, eighths: int) -> Tensor:
        if eighths == WIDTHS:
            found: Tensor = self._whole(states.unsqueeze(0))
            return found.squeeze(0)
        return self._ordered.first(channels_kept(self._ordered.count, eighths))(states)
