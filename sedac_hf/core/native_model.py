"""A base and its exit heads as the Rust core runs them, described anew when they change."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sedac_hf import _core
from sedac_hf.core.exit_heads import ExitBlock
from sedac_hf.core.huge_pages import join_pages
from sedac_hf.core.native_embedding import describe_embedding
from sedac_hf.core.native_layers import (
    DTYPES,
    LayerSetting,
    describe_gated,
    describe_layer,
    describe_linear,
    describe_matrix,
    describe_norm,
)
from sedac_hf.core.native_rotary import RotaryTables
from sedac_hf.core.weights import has_no_hooks, is_plain_linear
from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead
    from sedac_hf.core.mlp_channels import MlpChannels
    from sedac_hf.core.narrow_tail import NarrowTail

__all__ = ["NativeModel", "NativeParts"]

_VERSION = attrgetter("_version")
# What holds for one object in one process.
_OWN = ("_parts", "_refused", "_reason", "_joined", "_narrow", "_lock")


@dataclass(frozen=True)
class NativeParts:
    """What the Rust core was told of one state of the weights.

    Attributes:
        base: The base's layers.
        layers: What it was told of each of them.
        heads: Layers of the exit heads; None for heads that run through torch.
        output: Final norm and head.
        embedding: The base's embedding; None if it cannot be read in place.
        rotary: The base's rotary tables.
        tensors: Everything that was read, in the order of the modules.
        versioned: Those of them that count their changes; made in inference mode, they do not.
        marks: Addresses and versions.
    """

    base: _core.LayerStack
    layers: Sequence[_core.LayerWeights]
    heads: tuple[_core.LayerStack | None, ...]
    output: _core.OutputHead
    embedding: _core.Embedding | None
    rotary: RotaryTables
    tensors: list[Tensor]
    versioned: list[Tensor]
    marks: tuple[list[int], list[int]]

    def unchanged(self) -> bool:
        """Whether every tensor lies where it was, as it was."""
        # Asked in every step: two loops over some hundred tensors, without the interpreter's part.
        addresses, versions = self.marks
        if list(map(_VERSION, self.versioned)) != versions:
            return False
        return list(map(Tensor.data_ptr, self.tensors)) == addresses

    def storages(self) -> list[torch.UntypedStorage]:
        """The memory that was described; whoever holds it may read it unseen."""
        return [tensor.untyped_storage() for tensor in self.tensors]


@dataclass(frozen=True)
class NarrowStack:
    """Layers whose weights are copies.

    Attributes:
        stack: The layers.
        weights: The copies.
    """

    stack: _core.LayerStack
    weights: Sequence[MlpChannels]


class NativeModel:
    """Decides whether a base runs natively, and keeps its description current.

    Attributes:
        shell: Shell of the base.
        exit_heads: The exit heads.
    """

    def __init__(self, shell: BaseShell, heads: Sequence[ExitHead] = ()) -> None:
        """Remember what to look at; nothing is read yet.

        Args:
            shell: Shell of the base.
            heads: Exit heads in the order of their checkpoints.
        """
        self.shell = shell
        self.exit_heads = tuple(heads)
        self._parts: NativeParts | None = None
        self._reason: str | None = None
        self._refused: list[Any] | None = None
        self._joined: list[int] | None = None
        self._narrow: tuple[NativeParts, int, NarrowStack] | None = None
        self._lock = threading.Lock()

    @property
    def reason(self) -> str | None:
        """Why the base does not run natively, in words; None if it does."""
        try:
            self.parts(thorough=True)
        except NotNativeError as error:
            return str(error)
        return None

    def parts(self, *, thorough: bool = False) -> NativeParts:
        """The present description, made anew when weights have changed.

        Args:
            thorough: Also look for modules that were replaced or hooked; done once for each text,
                while addresses and versions are looked at in every call.

        Returns:
            The description.

        Raises:
            NotNativeError: If the base cannot run natively, or no longer.
        """
        found = self._parts
        if found is not None and not thorough and found.unchanged():
            return found
        with self._lock:
            found = self._parts
            if found is not None and self._is_current(found):
                return found
            return self._rebuild()

    def narrow_stack(self, parts: NativeParts, narrow: NarrowTail) -> NarrowStack:
        """The base's layers with the channels of their gated units in the order of importance.

        Layers before the first checkpoint, which everybody runs whole, are as they are.

        Args:
            parts: The present description.
            narrow: Keeps the weights in that order.

        Returns:
            The layers, and weights that must live as long as these are used.
        """
        found = self._narrow
        if found is not None and found[0] is parts and found[1] == narrow.version:
            return found[2]
        first = min((head.layer_idx + 1 for head in self.exit_heads), default=0)
        tail = [narrow.ordered(i) for i in range(first, len(parts.layers))]
        layers: list[Any] = list(parts.layers[:first])
        for layer, channels in zip(parts.layers[first:], tail, strict=True):
            layers.append({**layer, **describe_gated(channels)})
        stack = NarrowStack(_core.LayerStack(layers, None), tail)
        self._narrow = (parts, narrow.version, stack)
        return stack

    def _is_current(self, found: NativeParts) -> bool:
        if not found.unchanged() or any(not has_no_hooks(m) for m in self._modules()):
            return False
        tensors = self._tensors(found.rotary)
        same = len(tensors) == len(found.tensors)
        return same and all(a is b for a, b in zip(tensors, found.tensors, strict=True))

    def _rebuild(self) -> NativeParts:
        from sedac_hf.core.native_check import check_native

        state: list[Any] | None = None
        if self._reason is not None and self._refused == (state := self._state()):
            raise NotNativeError(self._reason)
        self._parts = None
        try:
            parts = self._build()
            check_native(self, parts)
        except NotNativeError as error:
            self._reason = f"{type(self.shell.base).__name__}: {error}"
            self._refused = self._state() if state is None else state
            raise NotNativeError(self._reason) from error
        self._parts, self._reason, self._refused = parts, None, None
        if self._joined != (addresses := parts.marks[0]):
            self._joined = addresses
            join_pages(parts.tensors)
        return parts

    def _state(self) -> list[Any]:
        """What a refusal depends on."""
        modules = [(id(m), has_no_hooks(m), m.training) for m in self._modules()]
        tensors = [*self.shell.base.parameters(), *self.shell.base.buffers()]
        return [modules, _marks(tensors)]

    def _modules(self) -> list[nn.Module]:
        return [*self.shell.base.modules(), *(m for h in self.exit_heads for m in h.modules())]

    def _tensors(self, rotary: RotaryTables) -> list[Tensor]:
        base = self.shell.base
        # An embedding may keep its scale in a buffer.
        scales = list(base.get_input_embeddings().buffers())
        found = list(base.parameters()) + scales + rotary.tensors
        for head in self.exit_heads:
            found += list(head.parameters())
        return found

    def _build(self) -> NativeParts:
        shell = self.shell
        base, config = shell.base, shell.base.config
        if base.training:
            raise NotNativeError("it is in training mode; call .eval()")
        if base.dtype not in DTYPES:
            raise NotNativeError(f"its type is {base.dtype}, expected one of {list(DTYPES)}")
        if away := {t.device.type for t in base.parameters()} - {"cpu"}:
            raise NotNativeError(f"it has weights on {sorted(away)}, the native pass needs the CPU")
        for module in (base, shell.decoder):
            if not has_no_hooks(module):
                raise NotNativeError(f"{type(module).__name__} carries a hook")
        count = shell.num_layers
        layer_types = list(getattr(config, "layer_types", None) or [None] * count)
        rotary = RotaryTables(shell.decoder, layer_types, base.dtype)
        windows = _windows(config, count)
        settings = [LayerSetting(rotary.of_layer[i], windows[i]) for i in range(count)]
        layers = [_layer(shell.layers[i], settings[i], f"layer {i}") for i in range(count)]
        tensors = self._tensors(rotary)
        return NativeParts(
            base=_core.LayerStack(layers, None),
            layers=layers,
            heads=tuple(self._head(head, settings) for head in self.exit_heads),
            output=self.output(base.get_output_embeddings()),
            embedding=describe_embedding(base.get_input_embeddings()),
            rotary=rotary,
            tensors=tensors,
            versioned=_versioned(tensors),
            marks=_marks(tensors),
        )

    def _head(self, head: ExitHead, settings: list[LayerSetting]) -> _core.LayerStack | None:
        if not isinstance(head, ExitBlock):
            return None
        name = f"the exit block after layer {head.layer_idx}"
        setting = settings[head.spec.resolved(self.shell.num_layers).template_layer]
        layers = [_layer(layer, setting, name) for layer in head.layers]
        if not is_plain_linear(head.mix) or not has_no_hooks(head):
            raise NotNativeError(f"{name} has a mix that is no plain nn.Linear, or a hook")
        return _core.LayerStack(layers, describe_matrix(head.mix.weight))

    def output(self, head: nn.Module | None) -> _core.OutputHead:
        """The final norm and an output layer.

        Args:
            head: The base's own, or a smaller one; it must be kept as long as what is returned.

        Raises:
            NotNativeError: If one of the two cannot be read.
        """
        norm = getattr(self.shell.decoder, "norm", None)
        weight, eps = describe_norm(norm, "the final norm")
        linear = describe_linear(head, "the output layer")
        config = self.shell.base.config
        cap = getattr(config, "final_logit_softcapping", None)
        return _core.OutputHead(weight, eps, linear, 1.0, None if cap is None else float(cap))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses and the lock: they mean nothing in a copy."""
        return {**self.__dict__, **dict.fromkeys(_OWN)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _layer(layer: nn.Module, setting: LayerSetting, name: str) -> _core.LayerWeights:
    try:
        return describe_layer(layer, setting)
    except NotNativeError as error:
        raise NotNativeError(f"{name}: {error}") from error


def _windows(config: Any, count: int) -> list[int | None]:
    """How far back each layer sees, as transformers itself reads it from the configuration."""
    layers = DynamicCache(config=config).layers
    if len(layers) != count:
        return [None] * count
    return [cast("int | None", getattr(layer, "sliding_window", None)) for layer in layers]


def _versioned(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if not tensor.is_inference()]


def _marks(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses of all, and versions of those that have one."""
    versions = [tensor._version for tensor in _versioned(tensors)]
    return [tensor.data_ptr() for tensor in tensors], versions


def threads() -> int:
    """Threads of a pass: those that torch has been given."""
    return torch.get_num_threads()
