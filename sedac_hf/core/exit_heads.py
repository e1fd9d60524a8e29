"""Exit heads: from a checkpoint's hidden state to a state that the base's norm and head can read.

A head never makes logits itself. Whatever depth a token left at, the base's own final norm and
output layer turn its state into logits, so one product serves all rows.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sedac_hf.config import CheckpointSpec
from sedac_hf.core.base_shell import LayerCall
from sedac_hf.core.kv_fill import KVOnlyCache, write_layer_kv
from sedac_hf.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["ExitBlock", "ExitHead", "ExitLens", "build_exit_head", "rms_normalise"]

# What architectures call a layer's index.
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
_DELTA_DOWN, _DELTA_UP = ".delta_down", ".delta_up"


def rms_normalise(hidden: Tensor) -> Tensor:
    """Scale states to unit root mean square; a zero state stays zero.

    States of different depths differ in size by orders of magnitude; without learned weights the
    same function serves every checkpoint and every base.

    Args:
        hidden: States, ``[..., width]``.

    Returns:
        The scaled states, same shape and dtype.
    """
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


class ExitHead(nn.Module):
    """What lensed and block heads have in common.

    Attributes:
        spec: The checkpoint that the head belongs to.
        layer_idx: The checkpoint's layer.
        cache_layers: Number of K/V cache layers of its own.
    """

    cache_layers: int = 0

    def __init__(self, spec: CheckpointSpec) -> None:
        """Remember the checkpoint."""
        super().__init__()
        self.spec = spec
        self.layer_idx = spec.layer_idx

    def forward(
        self,
        hidden: Tensor,
        call: LayerCall | None = None,
        cache: Any = None,
        first_cache_layer: int = 0,
        feedback: Tensor | None = None,
    ) -> Tensor:
        """State for the base's final norm.

        Args:
            hidden: The checkpoint's states, ``[rows, seq, width]``.
            call: What the base's decoder would pass to the head's template layer.
            cache: Cache that holds the head's own K/V; None for a whole sequence without cache.
            first_cache_layer: Index of the head's first layer in that cache.
            feedback: Final-layer states of the previous positions, like `hidden`.

        Returns:
            States, ``[rows, seq, width]``.
        """
        raise TypeError(f"{type(self).__name__} defines no forward")

    def fill(
        self,
        hidden: Tensor,
        call: LayerCall | None = None,
        cache: Any = None,
        first_cache_layer: int = 0,
        feedback: Tensor | None = None,
    ) -> None:
        """Write the head's own K/V for positions at which it is not run."""

    def export_tensors(self, shell: BaseShell) -> dict[str, Tensor]:
        """The weights as they are stored: bf16, contiguous, on the CPU."""
        del shell
        return {name: _stored(value) for name, value in self.state_dict().items()}

    def import_tensors(self, tensors: dict[str, Tensor], shell: BaseShell) -> None:
        """Take over stored weights.

        Args:
            tensors: What `export_tensors` gave.
            shell: Shell of the base, whose layers a low-rank delta starts from.

        Raises:
            ArtefactError: If a tensor is missing, unexpected, or of another shape.
        """
        del shell
        _load_strictly(self, tensors)


class ExitLens(ExitHead):
    """Low-rank residual affine map: ``h + up(down(norm(h)))``."""

    def __init__(self, spec: CheckpointSpec, width: int) -> None:
        """Begin as the identity, which is the plain logit lens.

        Args:
            spec: The checkpoint; `lens_rank` is the rank of the map.
            width: Width of the base's hidden states.
        """
        super().__init__(spec)
        self.down = nn.Linear(width, spec.lens_rank, bias=False)
        self.up = nn.Linear(spec.lens_rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(
        self,
        hidden: Tensor,
        call: LayerCall | None = None,
        cache: Any = None,
        first_cache_layer: int = 0,
        feedback: Tensor | None = None,
    ) -> Tensor:
        """See `ExitHead.forward`; call, cache and feedback are not used."""
        return cast(Tensor, hidden + self.up(self.down(rms_normalise(hidden))))


class ExitBlock(ExitHead):
    """One or two decoder layers of the base's own kind, with their own K/V cache layers.

    The block's input is ``h + mix([norm(h); norm(feedback)])``. The map starts at zero, so that an
    untrained block is the base's last layer put directly behind the checkpoint, and adding
    feedback never makes the start worse.
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        layers: list[nn.Module],
        width: int,
        cache_kwarg: str,
        cache_place: int,
    ) -> None:
        """Put a block together from fresh decoder layers; see `build_exit_head`.

        Args:
            spec: The checkpoint.
            layers: Decoder layers built for `spec.template_layer`.
            width: Width of the base's hidden states.
            cache_kwarg: Name of a layer's cache argument.
            cache_place: Its place among positional arguments behind the hidden state.
        """
        super().__init__(spec)
        self.layers = nn.ModuleList(layers)
        self.mix = nn.Linear(width * (2 if spec.feedback else 1), width, bias=False)
        nn.init.zeros_(self.mix.weight)
        self.cache_layers = len(layers)
        self._cache_kwarg = cache_kwarg
        self._cache_place = cache_place
        self._first_cache_layer = -1

    def forward(
        self,
        hidden: Tensor,
        call: LayerCall | None = None,
        cache: Any = None,
        first_cache_layer: int = 0,
        feedback: Tensor | None = None,
    ) -> Tensor:
        """See `ExitHead.forward`."""
        state = self._input(hidden, feedback)
        call = self._own_call(call, cache, first_cache_layer)
        for layer in self.layers:
            state = _run(layer, state, call)
        return state

    def fill(
        self,
        hidden: Tensor,
        call: LayerCall | None = None,
        cache: Any = None,
        first_cache_layer: int = 0,
        feedback: Tensor | None = None,
    ) -> None:
        """See `ExitHead.fill`."""
        if cache is None:
            return
        state = self._input(hidden, feedback)
        for layer in self.layers[:-1]:
            state = _run(layer, state, self._own_call(call, cache, first_cache_layer))
        call = self._own_call(call, KVOnlyCache(cache), first_cache_layer)
        write_layer_kv(self.layers[-1], state, call)

    def export_tensors(self, shell: BaseShell) -> dict[str, Tensor]:
        """The weights as stored: whole, or as low-rank differences to the base's layers."""
        whole = super().export_tensors(shell)
        rank = self.spec.delta_rank
        if self.spec.storage == "whole":
            return whole
        origin = self._origin_weights(shell)
        stored: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            if name not in origin or value.ndim != 2:
                stored[name] = whole[name]
                continue
            u, s, v = torch.linalg.svd(value.float() - origin[name].float(), full_matrices=False)
            stored[name + _DELTA_UP] = _stored(u[:, :rank] * s[:rank].sqrt())
            stored[name + _DELTA_DOWN] = _stored(s[:rank].sqrt()[:, None] * v[:rank])
        return stored

    def import_tensors(self, tensors: dict[str, Tensor], shell: BaseShell) -> None:
        """See `ExitHead.import_tensors`."""
        if self.spec.storage == "whole":
            _load_strictly(self, tensors)
            return
        origin = self._origin_weights(shell)
        whole: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if name.endswith(_DELTA_UP):
                stem = name.removesuffix(_DELTA_UP)
                if stem not in origin or stem + _DELTA_DOWN not in tensors:
                    raise ArtefactError(
                        f"exit head after layer {self.layer_idx}: {name} has no counterpart; the "
                        "file is damaged, fetch or fit the artefact again"
                    )
                whole[stem] = (
                    origin[stem].float() + value.float() @ tensors[stem + _DELTA_DOWN].float()
                )
            elif not name.endswith(_DELTA_DOWN):
                whole[name] = value
        _load_strictly(self, whole)

    def _input(self, hidden: Tensor, feedback: Tensor | None) -> Tensor:
        given = rms_normalise(hidden)
        if self.spec.feedback:
            if feedback is None:
                feedback = torch.zeros_like(hidden)
            given = torch.cat([given, rms_normalise(feedback).to(given.dtype)], -1)
        return cast(Tensor, hidden + self.mix(given))

    def _own_call(self, call: LayerCall | None, cache: Any, first_cache_layer: int) -> LayerCall:
        """The template's arguments with our cache in them."""
        if self._first_cache_layer != first_cache_layer:
            for place, layer in enumerate(self.layers):
                _number_layer(layer, first_cache_layer + place)
            self._first_cache_layer = first_cache_layer
        if call is None:
            raise ConfigError("a block head needs the arguments of its template layer")
        place = self._cache_place
        if len(call.args) > place:
            return LayerCall((*call.args[:place], cache, *call.args[place + 1 :]), call.kwargs)
        return LayerCall(call.args, {**call.kwargs, self._cache_kwarg: cache})

    def _origin_weights(self, shell: BaseShell) -> dict[str, Tensor]:
        """Weights of the base layers that the block began from, by the block's own names."""
        weights = {}
        for place, layer in enumerate(_origins(self.spec, shell)):
            for name, value in layer.state_dict().items():
                weights[f"layers.{place}.{name}"] = value.detach().cpu()
        return weights


def build_exit_head(spec: CheckpointSpec, shell: BaseShell) -> ExitHead:
    """Build the head of a checkpoint for a base.

    A block's layers are built from the base's configuration rather than copied, so that hooks,
    adapters, quantisation and offloading of the base stay out of them. They begin from the base's
    last layers where those weights are plain and at hand.

    Args:
        spec: The checkpoint.
        shell: Shell of the base.

    Returns:
        The untrained head, in the base's dtype, on the CPU.
    """
    config = shell.base.config.get_text_config()
    dtype = shell.base.dtype
    spec = spec.resolved(shell.num_layers)
    if spec.head == "lens":
        return ExitLens(spec, config.hidden_size).to(dtype)
    layers = []
    for origin in _origins(spec, shell):
        layer = _fresh_layer(type(origin), config, spec.template_layer).to(dtype)
        own, base = layer.state_dict(), origin.state_dict()
        if all(n in base and _is_plain(base[n], w) for n, w in own.items()):
            layer.load_state_dict({n: base[n] for n in own})
        layers.append(layer)
    head = ExitBlock(spec, layers, config.hidden_size, shell.cache_kwarg, shell.cache_place)
    return head.to(dtype).eval()


def _origins(spec: CheckpointSpec, shell: BaseShell) -> list[nn.Module]:
    """Base layers that a block begins from: the template and the one before it."""
    last = spec.resolved(shell.num_layers).template_layer
    return [shell.layers[max(last - back, 0)] for back in range(spec.num_layers - 1, -1, -1)]


def _fresh_layer(kind: type[nn.Module], config: Any, index: int) -> nn.Module:
    """A decoder layer of `kind`, built from the configuration and, where it asks, its index."""
    parameters = inspect.signature(kind).parameters
    given: dict[str, Any] = {name: index for name in _INDEX_NAMES if name in parameters}
    given["config"] = config
    needed = [n for n, p in parameters.items() if p.default is p.empty and n != "kwargs"]
    if "config" not in parameters or not given.keys() >= set(needed):
        raise ConfigError(
            f"{kind.__name__} cannot be built from a configuration and an index alone (it needs "
            f"{needed}), so no exit block can be made of its kind; use head='lens'."
        )
    return cast(nn.Module, cast(Any, kind)(**given))


def _is_plain(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and not found.is_meta and found.is_floating_point()


def _run(layer: nn.Module, state: Tensor, call: LayerCall) -> Tensor:
    output = layer(state, *call.args, **call.kwargs)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _number_layer(layer: nn.Module, index: int) -> None:
    """Tell a layer, and what is in it, which cache layer it writes to."""
    for module in layer.modules():
        for name in _INDEX_NAMES:
            if hasattr(module, name):
                setattr(module, name, index)


def _stored(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.bfloat16).contiguous()


def _load_strictly(head: ExitHead, tensors: dict[str, Tensor]) -> None:
    wanted = head.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted)
    wrong = sorted(n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape)
    if missing or unexpected or wrong:
        raise ArtefactError(
            f"exit head after layer {head.layer_idx}: missing {missing}, unexpected {unexpected}, "
            f"wrong shape {wrong}; the artefact does not fit its own configuration"
        )
    head.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted})
