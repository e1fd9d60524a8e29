"""Putting the parts of exits together for one base, and keeping them current."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from sedac_hf.core.attention_spread import spread_reason
from sedac_hf.core.cascade_controller import CascadeConfig, CascadeController
from sedac_hf.core.choose_pass import PassChoices
from sedac_hf.core.decoder_loop import ExitParts, LayerPass
from sedac_hf.core.draft_head import DraftHead
from sedac_hf.core.exit_cache import ExitCache
from sedac_hf.core.exit_heads import ExitBlock, ExitHead, ExitLens, build_exit_head
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.kv_fill import KVFill
from sedac_hf.core.narrow_tail import NarrowTail
from sedac_hf.core.support import module_device
from sedac_hf.core.weights import WeightWatch
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.config import CheckpointSpec
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.channel_order import ChannelOrder
    from sedac_hf.core.probe_inference import ProbeManager

__all__ = ["Assembly", "build_heads", "check_cascade", "check_modules"]


logger = logging.getLogger(__name__)


class Assembly:
    """The parts as the loop needs them, and the means to notice that they are stale.

    Attributes:
        parts: What the loop works with.
        choices: What runs loops that draft and verify, with what is known of the speed of drafts
            and exits.
    """

    def __init__(
        self,
        shell: BaseShell,
        heads: Sequence[ExitHead],
        probes: ProbeManager,
        draft_vocabulary: Tensor | None,
        channel_order: ChannelOrder | None = None,
        gates: GateParts | None = None,
    ) -> None:
        """Assemble; reads no weights until `prepare`.

        Args:
            shell: Shell of the base.
            heads: Exit heads in the order of their checkpoints.
            probes: Risk probes in the same order.
            draft_vocabulary: Token ids of the draft vocabulary, or None for the whole one.
            channel_order: The order of the MLPs' channels, for soft exits.
            gates: Fusion weights and classes of tokens, where there are some.
        """
        narrow = None if channel_order is None else NarrowTail(shell, channel_order)
        first = min((head.layer_idx + 1 for head in heads), default=shell.num_layers)
        self._fill = KVFill(shell, first)
        self._probe_watch: WeightWatch | None = None
        self._controllers: dict[CascadeConfig, CascadeController] = {}
        self._reasons: dict[int, str | None] = {}
        self.parts = ExitParts(
            shell=shell,
            passes=LayerPass(shell, self._fill, narrow),
            heads=tuple(heads),
            probes=probes,
            draft=DraftHead(shell, draft_vocabulary),
            layout=ExitCache(shell.num_layers, heads),
            gates=gates or GateParts(),
        )
        self.choices = PassChoices(self.parts)

    def prepare_narrow(self) -> NarrowTail:
        """The layers with fewer channels, up to date.

        Raises:
            ConfigError: If the model has no order of channels.
            UnsupportedModelError: If the base's MLPs cannot be narrowed any more.
        """
        narrow = cast(LayerPass, self.parts.passes).narrow
        if narrow is None:
            raise ConfigError(
                "soft exits need the order of the MLPs' channels, and this model has none. Give it "
                "one with model.set_channel_order(channel_order(model.base, documents)) of "
                "sedac_hf.calibration, or fit again."
            )
        narrow.prepare()
        return narrow

    @property
    def fill(self) -> KVFill:
        """What fills the K/V of skipped layers."""
        return self._fill

    def prepare(self) -> None:
        """Bring everything that was derived from weights up to date; cheap when nothing changed."""
        if not self.parts.heads:
            return
        self._fill.prepare()
        self.parts.draft.prepare()
        weights = list(self.parts.probes.parameters())
        if self._probe_watch is None or not self._probe_watch.unchanged(weights):
            self._controllers = {}
            self._probe_watch = WeightWatch(weights)

    def controller(self, cascade: CascadeConfig) -> CascadeController:
        """The cascade with the probes' present weights.

        Args:
            cascade: Rules of the checkpoints.
        """
        found = self._controllers.get(cascade)
        if found is None:
            probes = self.parts.probes
            packed = [probes.native(k) for k in range(len(self.parts.heads))]
            found = CascadeController(
                cascade, packed, gates=self.parts.gates, modules=self.parts.probes
            )
            self._warn_of_blind_gates(found)
            # Verification tries many policies; keeping the last few is enough.
            if len(self._controllers) >= 8:
                self._controllers = {}
            self._controllers[cascade] = found
        return found

    def _warn_of_blind_gates(self, controller: CascadeController) -> None:
        """Say so, once, where gates ask for what the base's attention does not show."""
        for k in controller.attentive:
            layer = self.parts.heads[k].layer_idx
            if layer not in self._reasons:
                self._reasons[layer] = reason = spread_reason(self.parts.shell, layer)
                if reason is not None:
                    logger.warning(
                        "The gates of the checkpoint after layer %d go by its attention, which "
                        "cannot be seen, so nothing leaves there over the base's own modules. %s",
                        layer,
                        reason,
                    )


def build_heads(specs: Sequence[CheckpointSpec], shell: BaseShell) -> list[ExitHead]:
    """Untrained heads, each on the device of the layer it stands behind.

    Args:
        specs: Checkpoints, by increasing layer.
        shell: Shell of the base.
    """
    heads = []
    for spec in specs:
        head = build_exit_head(spec, shell)
        heads.append(head.to(module_device(shell.layers[max(spec.layer_idx, 0)])))
    return heads


def check_cascade(cascade: CascadeConfig, specs: Sequence[CheckpointSpec]) -> None:
    """Refuse a cascade whose checkpoints are not those of the model.

    Args:
        cascade: Rules of the checkpoints.
        specs: The model's checkpoints.

    Raises:
        ConfigError: If their layers differ.
    """
    found = [layer.layer_idx for layer in cascade.layers]
    expected = [spec.layer_idx for spec in specs]
    if found != expected:
        raise ConfigError(
            f"The cascade has rules for checkpoints after layers {found}, but the model has its "
            f"checkpoints after layers {expected}."
        )


def check_modules(
    specs: Sequence[CheckpointSpec],
    heads: Sequence[ExitHead],
    probes: ProbeManager,
    width: int,
) -> None:
    """Refuse heads and probes that do not fit the checkpoints or the base's width.

    Args:
        specs: The model's checkpoints.
        heads: One head per checkpoint.
        probes: One probe per checkpoint.
        width: Width of the base's hidden states.

    Raises:
        ConfigError: If a number, a layer or a width differs.
    """
    layers = [spec.layer_idx for spec in specs]
    if [head.layer_idx for head in heads] != layers or len(probes) != len(layers):
        raise ConfigError(
            f"Expected one head and one probe for each checkpoint after layers {layers}; found "
            f"heads after {[head.layer_idx for head in heads]} and {len(probes)} probes."
        )
    for k, head in enumerate(heads):
        found = {"probe": cast(Any, probes.probes[k]).project.in_features}
        if isinstance(head, ExitLens):
            found["head"] = head.down.in_features
        elif isinstance(head, ExitBlock):
            found["head"] = head.mix.out_features
        for name, value in found.items():
            if value != width:
                raise ConfigError(
                    f"The {name} after layer {layers[k]} works on states of width {value}, but the "
                    f"base's are {width} wide. Was it made for another base?"
                )
