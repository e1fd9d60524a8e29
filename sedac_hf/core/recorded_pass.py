"""Layers whose outputs are known beforehand, for simulating exits that are settled later.

Where the tail of an exited token is run after all (`settle`), K/V are those of the base whatever
leaves, so the base's states are those of one ordinary forward; only exit heads depend on the exits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.core.attention_spread import Spread
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell, LayerCall
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.narrow_tail import KeptChannels

__all__ = ["RecordedPass"]


class RecordedPass:
    """Answers for the layers from memory; takes the place of a `LayerPass`.

    Attributes:
        span: Positions that the next call is about.
    """

    def __init__(
        self,
        shell: BaseShell,
        states: dict[int, Tensor],
        spreads: dict[int, Tensor] | None = None,
    ) -> None:
        """Keep what was recorded.

        Args:
            shell: Shell of the base.
            states: States `[rows, seq, width]` by the number of layers that were run.
            spreads: How evenly the last of these layers attends, `[rows, seq]` each; where it was
                looked at.
        """
        self._shell = shell
        self._states = states
        self._spreads = spreads or {}
        self.span = slice(None)

    @classmethod
    def record(
        cls, parts: ExitParts, arguments: dict[str, Any], observed: Collection[int] = ()
    ) -> RecordedPass:
        """Run the base once at full depth and keep its states at every checkpoint.

        Args:
            parts: What exits are made of.
            arguments: What the base's forward is given; whole sequences, no cache.
            observed: Checkpoints of whose layers it is kept how evenly they attend.

        Returns:
            The recording.
        """
        hidden, calls = parts.shell.prologue(**{**arguments, "use_cache": False})
        states, spreads, at = {}, {}, 0
        for k, stop in enumerate([*(head.layer_idx + 1 for head in parts.heads), len(calls)]):
            spread = Spread() if k in observed else None
            hidden = parts.passes.run(hidden, calls, at, stop, spread=spread)
            states[stop] = hidden
            if spread is not None and spread.risk is not None:
                spreads[stop] = spread.risk
            at = stop
        return cls(parts.shell, states, spreads)

    @property
    def final(self) -> Tensor:
        """States after the last layer, `[rows, seq, width]`."""
        return self._states[self._shell.num_layers]

    def put_into(self, parts: ExitParts) -> ExitParts:
        """The same parts, working from this recording."""
        return replace(parts, passes=self)

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
        """See `LayerPass.run`; whoever has left goes on as if it had not, on all channels."""
        del hidden, left, kept
        if spread is not None and (known := self._spreads.get(stop)) is not None and start < stop:
            spread.risk = known[:, self.span]
        self.fill(self._states[stop], calls, start, stop)
        return self._states[stop][:, self.span]

    def run_all(self, hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        """See `LayerPass.run_all`."""
        return self.run(hidden, calls, 0, len(calls))

    def fill(self, hidden: Tensor, calls: list[LayerCall], start: int, stop: int) -> None:
        """Keep the lengths of the base's cache layers in step; nobody reads their contents."""
        cache = self._shell.cache_of(calls[0]) if calls else None
        if cache is None or start >= stop:
            return
        if stop not in self._states:
            raise ConfigError(f"nothing was recorded after {stop} layers, only {[*self._states]}.")
        part = self._states[stop][:, self.span]
        blank = torch.zeros((part.shape[0], 1, part.shape[1], 1), device=part.device)
        for i in range(start, stop):
            cache.update(blank, blank, i)
