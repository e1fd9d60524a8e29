"""The base's own prologue and epilogue around a loop of ours.

A shallow copy of the modules from the causal LM down to its decoder is made per call; in it the
layer list holds stubs that record how the decoder calls each layer. The last stub runs our loop.
Embeddings, masks, rotary tables, norm, head and scaling thus stay the base's own code, for every
architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from sedac_hf.core.epilogue import watch_epilogue
from sedac_hf.core.support import (
    check_supported,
    find_cache_argument,
    find_decoder,
    module_device,
    module_path,
)
from sedac_hf.errors import SedacError, UnsupportedModelError

__all__ = ["KEEP", "BaseShell", "LayerCall", "Loop"]

# Marks "leave the recorded cache"; None is a value of its own (no cache).
KEEP: Final[Any] = object()
# Put on an instance by accelerate or torch.compile; they would lead back to the real module.
_INSTANCE_PATCHES = frozenset({"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"})


@dataclass(slots=True)
class LayerCall:
    """What the base's decoder passes to one layer, hidden state removed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Loop = Callable[[Tensor, list[LayerCall]], Tensor]


class _Record:
    """One run through the shell: the loop to run and the calls seen so far."""

    __slots__ = ("calls", "done", "first_only", "loop")

    def __init__(self, loop: Loop, first_only: bool = False) -> None:
        self.loop = loop
        self.calls: list[LayerCall] = []
        self.done = False
        self.first_only = first_only


class _PrologueDone(BaseException):
    """Leaves the base's forward once the prologue is known; never seen outside this file."""

    def __init__(self, hidden: Tensor, calls: list[LayerCall]) -> None:
        super().__init__()
        self.hidden = hidden
        self.calls = calls


_RECORD: ContextVar[_Record] = ContextVar("sedac_shell_record")


class _Stub:
    """Stands in for one decoder layer inside the shell."""

    __slots__ = ("_last", "_layer", "_shell")

    def __init__(self, shell: BaseShell, layer: nn.Module, last: bool) -> None:
        self._shell = shell
        self._layer = layer
        self._last = last

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        record = _RECORD.get()
        record.calls.append(LayerCall(args, kwargs))
        if record.first_only:
            raise _PrologueDone(hidden, record.calls)
        if self._last:
            hidden = record.loop(hidden, record.calls)
            record.done = True
        return (hidden,) if self._shell.returns_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        # Some decoders ask a layer for its type before calling it.
        return getattr(self._layer, name)


def _hooked_forward(copy: nn.Module, real: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a copy whose original carries an accelerate hook."""
    hook = cast(Any, real)._hf_hook
    args, kwargs = hook.pre_forward(real, *args, **kwargs)
    return hook.post_forward(real, type(copy).forward(copy, *args, **kwargs))


def _shallow_copy(module: nn.Module, overrides: dict[str, Any]) -> nn.Module:
    """A copy that shares everything with `module` except the attributes in `overrides`."""
    copy: nn.Module = object.__new__(type(module))
    state = {k: v for k, v in module.__dict__.items() if k not in _INSTANCE_PATCHES}
    modules = state["_modules"]
    state["_modules"] = {k: v for k, v in modules.items() if k not in overrides}
    if "_hf_hook" in module.__dict__:
        state["forward"] = partial(_hooked_forward, copy, module)
    state.update(overrides)
    object.__setattr__(copy, "__dict__", state)
    return copy


@dataclass(frozen=True)
class _Epilogue:
    """How to go from the last layer's output to logits without running the decoder."""

    modules: tuple[str, ...]  # children of the decoder applied in order, such as the final norm
    output_type: type[Any]


class BaseShell:
    """Runs a base model's forward around a loop of ours.

    Attributes:
        base: The causal LM, untouched.
        decoder: The module that owns the layers.
        num_layers: Number of decoder layers.
        cache_kwarg: Name of a layer's cache argument.
        cache_place: Its place among positional arguments after the hidden state.
        cache_place: Its place among positional arguments behind the hidden state.
        layer_list: The layers as a plain list, as of the last run.
    """

    def __init__(self, base: nn.Module) -> None:
        """Find the decoder of `base` and how its layers are called.

        Args:
            base: A decoder-only causal LM of transformers.

        Raises:
            UnsupportedModelError: If the model is of a kind that cannot be run this way.
        """
        check_supported(base)
        self.base: Any = base
        self.decoder, self._layers_name = find_decoder(base)
        self._path = module_path(base, self.decoder)
        self.cache_kwarg, self.cache_place = find_cache_argument(self.layers[0])
        self.num_layers = len(self.layers)
        self.layer_list: list[nn.Module] = []
        self._stubs: list[_Stub] = []
        self._returns_tuple: bool | None = None
        self._epilogue: _Epilogue | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The base's decoder layers."""
        return cast(nn.ModuleList, getattr(self.decoder, self._layers_name))

    @property
    def input_device(self) -> torch.device:
        """Where token ids belong."""
        return module_device(self.base.get_input_embeddings())

    @property
    def vocabulary_size(self) -> int:
        """Words that the base's head scores."""
        return int(self.base.config.vocab_size)

    @property
    def returns_tuple(self) -> bool:
        """Whether the layers return tuples; found out by running one layer once."""
        if self._returns_tuple is None:
            self._returns_tuple = self._probe_return()
        return self._returns_tuple

    def run(self, loop: Loop, **forward_kwargs: Any) -> Any:
        """Run the base's forward with `loop` in place of its layers.

        Args:
            loop: Called with the embeddings `[rows, seq, width]` and one call per layer; returns
                the state after the last layer, same shape.
            **forward_kwargs: What the base's forward takes.

        Returns:
            The base's own output object.
        """
        if forward_kwargs.get("output_hidden_states") or forward_kwargs.get("output_attentions"):
            # Hooks must sit on the real layers: the copy has none for them to be put on.
            maybe_install_capturing_hooks(cast(Any, self.decoder))
        record = _Record(loop)
        output = self._call(record, {}, {}, forward_kwargs)
        if not record.done:
            raise SedacError(
                f"{type(self.base).__name__} did not call its last decoder layer (layer drop in "
                "training mode?). Call .eval() before running it with exits."
            )
        return output

    def prologue(self, **forward_kwargs: Any) -> tuple[Tensor, list[LayerCall]]:
        """Embeddings and recorded calls; runs no layer and no epilogue.

        Args:
            **forward_kwargs: What the base's forward takes.

        Returns:
            Embeddings `[rows, seq, width]` and the arguments of each layer.
        """

        def stop(hidden: Tensor, calls: list[LayerCall]) -> Tensor:
            raise _PrologueDone(hidden, calls)

        try:
            self.run(stop, **forward_kwargs)
        except _PrologueDone as done:
            return done.hidden, done.calls
        raise SedacError(f"{type(self.base).__name__} never reached its layers.")

    def layer(self, i: int, hidden: Tensor, call: LayerCall, cache: Any = KEEP) -> Tensor:
        """Run decoder layer `i`.

        Args:
            i: 0-based index of the layer.
            hidden: State `[rows, seq, width]`.
            call: Arguments as recorded for that layer.
            cache: Cache to use instead of the recorded one; None for none.

        Returns:
            State after the layer, same shape.
        """
        if cache is not KEEP:
            call = self.with_cache(call, cache)
        output = self.layer_list[i](hidden, *call.args, **call.kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def cache_of(self, call: LayerCall) -> Any:
        """The cache that a recorded call carries, or None."""
        if len(call.args) > self.cache_place:
            return call.args[self.cache_place]
        return call.kwargs.get(self.cache_kwarg)

    def with_cache(self, call: LayerCall, cache: Any) -> LayerCall:
        """The same call with another cache."""
        place = self.cache_place
        if len(call.args) > place:
            return LayerCall((*call.args[:place], cache, *call.args[place + 1 :]), call.kwargs)
        return LayerCall(call.args, {**call.kwargs, self.cache_kwarg: cache})

    def logits(self, hidden: Tensor, *, vocabulary: nn.Linear | None = None) -> Tensor:
        """The base's epilogue alone: final norm, head, soft-cap, scale.

        Args:
            hidden: States after the last layer, `[rows, seq, width]`.
            vocabulary: A smaller output layer to use in place of the base's head.

        Returns:
            Logits `[rows, seq, vocabulary]`.
        """
        if self._epilogue is None:
            self._epilogue = self._find_epilogue()
        if not self._epilogue.modules:
            return self._logits_through_decoder(hidden, vocabulary)
        return self._logits_direct(self._epilogue, hidden, vocabulary)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the base does between its last layer and its head.

        Args:
            hidden: States after the last layer, `[rows, seq, width]`.

        Returns:
            Normalised states, `[rows, seq, width of the head]`.
        """
        if self._epilogue is None:
            self._epilogue = self._find_epilogue()
        for name in self._epilogue.modules:
            hidden = getattr(self.decoder, name)(hidden)
        return hidden

    def refresh(self) -> None:
        """Take note of layers that were replaced since the last call."""
        layers = list(self.layers)
        if layers != self.layer_list:
            last = len(layers) - 1
            self._stubs = [_Stub(self, layer, i == last) for i, layer in enumerate(layers)]
            self.layer_list = layers

    def run_decoder(self, loop: Loop, overrides: dict[str, Any], **forward_kwargs: Any) -> Any:
        """Run the decoder alone, with some of its children replaced.

        Args:
            loop: As for `run`.
            overrides: Attributes of the decoder and what stands in for them.
            **forward_kwargs: What the decoder's forward takes.

        Returns:
            The decoder's own output object.
        """
        self.refresh()
        decoder = _shallow_copy(self.decoder, {**overrides, self._layers_name: self._stubs})
        token = _RECORD.set(_Record(loop))
        try:
            return decoder(**forward_kwargs)
        finally:
            _RECORD.reset(token)

    def _call(
        self,
        record: _Record,
        overrides: dict[str, Any],
        root_overrides: dict[str, Any],
        forward_kwargs: dict[str, Any],
    ) -> Any:
        """Run a copy of the base whose layers are stubs reporting to `record`."""
        self.refresh()
        overrides = {**overrides, self._layers_name: self._stubs}
        if self._path:
            shell = self._around(_shallow_copy(self.decoder, overrides), root_overrides)
        else:
            shell = _shallow_copy(self.base, {**overrides, **root_overrides})
        token = _RECORD.set(record)
        try:
            return shell(**forward_kwargs)
        finally:
            _RECORD.reset(token)

    def _around(self, decoder: Any, root_overrides: dict[str, Any]) -> Any:
        """Copies of the modules above the decoder, with `decoder` in its place."""
        modules = [self.base]
        for name in self._path[:-1]:
            modules.append(getattr(modules[-1], name))
        inner = decoder
        for depth in range(len(modules) - 1, -1, -1):
            extra = root_overrides if depth == 0 else {}
            inner = _shallow_copy(modules[depth], {self._path[depth]: inner, **extra})
        return inner

    def _head_override(self, vocabulary: nn.Linear | None) -> dict[str, Any]:
        if vocabulary is None:
            return {}
        head = self.base.get_output_embeddings()
        for name, child in self.base.named_children():
            if child is head:
                return {name: vocabulary}
        raise UnsupportedModelError(
            f"{type(self.base).__name__} has no output layer of its own that a smaller vocabulary "
            "could stand in for."
        )

    def _logits_direct(
        self, epilogue: _Epilogue, hidden: Tensor, vocabulary: nn.Linear | None
    ) -> Tensor:
        for name in epilogue.modules:
            hidden = getattr(self.decoder, name)(hidden)
        output = epilogue.output_type(last_hidden_state=hidden)
        shell = self._around(lambda *args, **kwargs: output, self._head_override(vocabulary))
        return cast(Tensor, shell(inputs_embeds=hidden, use_cache=False).logits)

    def _logits_through_decoder(self, hidden: Tensor, vocabulary: nn.Linear | None) -> Tensor:
        """The slow way: the whole forward with the states put in after the last layer."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.input_device)
        record = _Record(lambda _, calls: hidden)
        head = self._head_override(vocabulary)
        output = self._call(record, {}, head, {"input_ids": ids, "use_cache": False})
        return cast(Tensor, output.logits)

    @torch.no_grad()
    def _probe_return(self) -> bool:
        """Run the first layer on one token and look at what it returns."""
        ids = torch.ones((1, 1), dtype=torch.long, device=self.input_device)
        record = _Record(lambda hidden, calls: hidden, first_only=True)
        try:
            self._call(record, {}, {}, {"input_ids": ids, "use_cache": False})
        except _PrologueDone as done:
            call = self.with_cache(done.calls[0], None)
            output = self.layer_list[0](done.hidden, *call.args, **call.kwargs)
            return isinstance(output, tuple)
        raise SedacError(f"{type(self.base).__name__} never called its first decoder layer.")

    @torch.no_grad()
    def _find_epilogue(self) -> _Epilogue:
        """Watch what the decoder applies after its layers, and check the finding."""
        names, output_type = watch_epilogue(self)
        ids = torch.ones((1, 2), dtype=torch.long, device=self.input_device)
        hidden, _ = self.prologue(input_ids=ids, use_cache=False)
        found = _Epilogue(names, output_type)
        if names and self._path:
            direct = self._logits_direct(found, hidden, None)
            if torch.equal(direct, self._logits_through_decoder(hidden, None)):
                return found
        return _Epilogue((), output_type)
