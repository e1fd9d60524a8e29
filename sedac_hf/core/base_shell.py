"""The base's own prologue and epilogue around a loop of ours.

A shallow copy of the modules from the causal LM down to its decoder is made per call; in it the
layer list holds stubs that record how the decoder calls each layer. The last stub runs our loop.
Embeddings, masks, rotary tables, norm, head and scaling thus stay the base's own code, for every
architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from sedac_hf.core.cache_names import cache_name
from sedac_hf.core.epilogue import watch_epilogue
from sedac_hf.core.stand_ins import (
    RECORD,
    LayerCall,
    LayerStub,
    Loop,
    PrologueDone,
    RunRecord,
    shallow_copy,
)
from sedac_hf.core.support import (
    check_supported,
    find_cache_argument,
    find_decoder,
    module_device,
    module_path,
)
from sedac_hf.errors import SedacError, UnsupportedModelError

if TYPE_CHECKING:
    from sedac_hf.core.attention_spread import Spread

__all__ = ["KEEP", "BaseShell", "LayerCall", "Loop"]

# Marks "leave the recorded cache"; None is a value of its own (no cache).
KEEP: Final[Any] = object()


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
        self.cache_kwarg, self.cache_place = find_cache_argument(self.layers[0], self.decoder)
        self._cache_name = cache_name(type(base).forward)
        self.num_layers = len(self.layers)
        self.layer_list: list[nn.Module] = []
        self._stubs: list[LayerStub] = []
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
        record = RunRecord(loop)
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
            raise PrologueDone(hidden, calls)

        try:
            self.run(stop, **forward_kwargs)
        except PrologueDone as done:
            return done.hidden, done.calls
        raise SedacError(f"{type(self.base).__name__} never reached its layers.")

    def cached(self, cache: Any) -> dict[str, Any]:
        """Arguments by which the base's forward, and `prologue`, work on a cache.

        Args:
            cache: A transformers cache.
        """
        return {self._cache_name: cache, "use_cache": True}

    def layer(
        self,
        i: int,
        hidden: Tensor,
        call: LayerCall,
        cache: Any = KEEP,
        spread: Spread | None = None,
    ) -> Tensor:
        """Run decoder layer `i`.

        Args:
            i: 0-based index of the layer.
            hidden: State `[rows, seq, width]`.
            call: Arguments as recorded for that layer.
            cache: Cache to use instead of the recorded one; None for none.
            spread: Takes how evenly it attends; None where nobody asks.

        Returns:
            State after the layer, same shape.
        """
        if cache is not KEEP:
            call = self.with_cache(call, cache)
        layer: Any = self.layer_list[i]
        run = layer if spread is None else partial(spread.run, layer)
        output = run(hidden, *call.args, **call.kwargs)
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

    def refresh(self) -> None:
        """Take note of layers that were replaced since the last call."""
        layers = list(self.layers)
        if layers != self.layer_list:
            last = len(layers) - 1
            self._stubs = [LayerStub(self, layer, i == last) for i, layer in enumerate(layers)]
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
        _ = self.returns_tuple
        self.refresh()
        decoder = shallow_copy(self.decoder, {**overrides, self._layers_name: self._stubs})
        token = RECORD.set(RunRecord(loop))
        try:
            return decoder(**forward_kwargs)
        finally:
            RECORD.reset(token)

    def _call(
        self,
        record: RunRecord,
        overrides: dict[str, Any],
        root_overrides: dict[str, Any],
        forward_kwargs: dict[str, Any],
    ) -> Any:
        """Run a copy of the base whose layers are stubs reporting to `record`."""
        if not record.first_only:
            # Found out beforehand: it runs a layer, which must not happen amid another run.
            _ = self.returns_tuple
        self.refresh()
        overrides = {**overrides, self._layers_name: self._stubs}
        if self._path:
            shell = self._around(shallow_copy(self.decoder, overrides), root_overrides)
        else:
            shell = shallow_copy(self.base, {**overrides, **root_overrides})
        token = RECORD.set(record)
        try:
            return shell(**forward_kwargs)
        finally:
            RECORD.reset(token)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what `refresh` makes anew."""
        return {**self.__dict__, "layer_list": [], "_stubs": []}

    def _around(self, decoder: Any, root_overrides: dict[str, Any]) -> Any:
        """Copies of the modules above the decoder, with `decoder` in its place."""
        modules = [self.base]
        for name in self._path[:-1]:
            modules.append(getattr(modules[-1], name))
        inner = decoder
        for depth in range(len(modules) - 1, -1, -1):
            extra = root_overrides if depth == 0 else {}
            inner = shallow_copy(modules[depth], {self._path[depth]: inner, **extra})
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
        record = RunRecord(lambda _, calls: hidden)
        head = self._head_override(vocabulary)
        output = self._call(record, {}, head, {"input_ids": ids, "use_cache": False})
        return cast(Tensor, output.logits)

    @torch.no_grad()
    def _probe_return(self) -> bool:
        """Run the first layer on one token and look at what it returns."""
        ids = torch.ones((1, 1), dtype=torch.long, device=self.input_device)
        record = RunRecord(lambda hidden, calls: hidden, first_only=True)
        try:
            self._call(record, {}, {}, {"input_ids": ids, "use_cache": False})
        except PrologueDone as done:
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
