"""Noise on hidden states at the checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sedac_hf.core.decoder_loop import LayerPass

if TYPE_CHECKING:
    from collections.abc import Collection

    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.base_shell import BaseShell, LayerCall
    from sedac_hf.core.kv_fill import KVFill
    from sedac_hf.core.narrow_tail import KeptChannels, NarrowTail

__all__ = ["NoisyPass"]


class NoisyPass(LayerPass):
    """The base's layers, with Gaussian noise added to what stands at each checkpoint.

    A state h of width W becomes `h + strength * rms(h) * z`, where `rms(h)` is the root of the mean
    of its W squares and z is drawn from a standard normal distribution, independently for every
    position and component. Probe, exit head and all deeper layers work on from there.
    """

    def __init__(
        self,
        shell: BaseShell,
        fill: KVFill,
        checkpoints: Collection[int],
        strength: float,
        seed: int,
        narrow: NarrowTail | None = None,
    ) -> None:
        """Prepare one forward.

        Args:
            shell: Shell of the base.
            fill: Fills skipped layers.
            checkpoints: Layers behind which noise is added; -1 is the embedding.
            strength: Size of the noise relative to a state's root mean square; 0 adds none.
            seed: Seed of the noise. Two strengths of one seed have the same z.
            narrow: The layers with fewer channels, for soft exits.
        """
        super().__init__(shell, fill, narrow)
        self._stops = {layer + 1 for layer in checkpoints}
        self._strength = strength
        self._generator = torch.Generator().manual_seed(seed)

    def run(
        self,
        hidden: Tensor,
        calls: list[LayerCall],
        start: int,
        stop: int,
        left: Tensor | None = None,
        kept: KeptChannels | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """See `LayerPass.run`; what has left is not disturbed."""
        output = super().run(hidden, calls, start, stop, left, kept, spread)
        if stop not in self._stops or self._strength == 0:
            return output
        # Drawn on the CPU, so that every device gets the same.
        noise = torch.randn(output.shape, generator=self._generator).to(output.device)
        wide = output.float()
        size = self._strength * wide.square().mean(-1, keepdim=True).sqrt()
        noisy = (wide + size * noise).to(output.dtype)
        return noisy if left is None else torch.where(left.to(output.device), output, noisy)
