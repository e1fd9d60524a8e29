"""K and V of many layers from one state, as a single product.

In decoders of the Llama recipe every layer that an exited token skips starts from the same state:
the RMS factor is common, the norm weights can be folded into the projections, and all of these
stacked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.core.weights import WeightWatch, has_no_hooks, is_plain_linear, is_plain_tensor

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell, LayerCall

__all__ = ["StackedKV", "build_stacked_kv"]

# The stack is a second copy of the K/V projections of the tail; above this it is not worth having.
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class _Parts:
    """The modules of one layer that its K and V depend on."""

    norm: nn.Module
    k_proj: nn.Linear
    v_proj: nn.Linear
    k_norm: nn.Module | None
    attention: nn.Module
    rotary: bool

    def tensors(self) -> list[Tensor]:
        """The weights themselves."""
        found: list[Any] = [self.norm.weight, self.k_proj.weight, self.v_proj.weight]
        found += [self.k_proj.bias, self.v_proj.bias]
        found.append(None if self.k_norm is None else self.k_norm.weight)
        return [cast(Tensor, tensor) for tensor in found if tensor is not None]


class StackedKV:
    """The stacked product and what is needed to know that it still holds."""

    def __init__(self, shell: BaseShell, first_layer: int, parts: list[_Parts]) -> None:
        """Fold and stack the projections of layers `first_layer` to the last."""
        self.first_layer = first_layer
        self._shell = shell
        self._parts = parts
        self._watch = WeightWatch([tensor for part in parts for tensor in part.tensors()])
        self.width = parts[0].k_proj.in_features
        self.dtype = parts[0].k_proj.weight.dtype
        self.device = parts[0].k_proj.weight.device
        self._eps = _epsilon(parts[0].norm)
        self._head_dim = int(cast(Any, parts[0].attention).head_dim)
        self._heads = parts[0].k_proj.out_features // self._head_dim
        self._weight = torch.cat([_folded(part) for part in parts])
        projections = [p for part in parts for p in (part.k_proj, part.v_proj)]
        has_bias = any(projection.bias is not None for projection in projections)
        self._bias = torch.cat([_biases(part) for part in parts]) if has_bias else None
        self._key_scale, self._key_eps = _key_norms(parts)
        self._rotary = [part.rotary for part in parts]
        self._rotate = _rotary_function(parts[0].attention)

    def is_current(self) -> bool:
        """Whether the base's modules and weights are still those the stack was made from."""
        parts = find_parts(self._shell, self.first_layer)
        if parts is None or parts != self._parts:
            return False
        return self._watch.unchanged([tensor for part in parts for tensor in part.tensors()])

    def fill(
        self, hidden: Tensor, calls: list[LayerCall], start: int, stop: int, cache: Any
    ) -> None:
        """Write the K/V of layers `start` to `stop - 1`.

        Args:
            hidden: Frozen states `[rows, seq, width]`.
            calls: Recorded calls of all layers.
            start: First layer to fill.
            stop: End of the layers to fill.
            cache: Where to write.
        """
        rows, seq, _ = hidden.shape
        low, high = start - self.first_layer, stop - self.first_layer
        span = 2 * self._heads * self._head_dim
        weight = self._weight[low * span : high * span]
        bias = None if self._bias is None else self._bias[low * span : high * span]
        states = functional.linear(_normed(hidden, self._eps), weight, bias)
        states = states.view(rows, seq, high - low, 2, self._heads, self._head_dim)
        keys, values = states[:, :, :, 0], states[:, :, :, 1]
        if self._key_scale is not None:
            keys = _normed(keys, self._key_eps) * self._key_scale[low:high, None]
        keys = keys.permute(0, 2, 3, 1, 4)  # [rows, layers, heads, seq, head_dim]
        values = values.permute(0, 2, 3, 1, 4)
        for at, group in self._rotated(keys, calls, start, stop):
            for offset in range(group.shape[1]):
                i = at + offset
                cache.update(group[:, offset], values[:, i - start], i)

    def _rotated(
        self, keys: Tensor, calls: list[LayerCall], start: int, stop: int
    ) -> list[tuple[int, Tensor]]:
        """Keys with their rotary embedding, in runs of layers that share one table."""
        runs: list[tuple[int, int, Any]] = []
        for i in range(start, stop):
            rotary = self._rotary[i - self.first_layer]
            table = calls[i].kwargs["position_embeddings"] if rotary else None
            if runs and runs[-1][2] is table:
                runs[-1] = (runs[-1][0], i + 1, table)
            else:
                runs.append((i, i + 1, table))
        found: list[tuple[int, Tensor]] = []
        for low, high, table in runs:
            part = keys[:, low - start : high - start]
            if table is not None:
                # Heads of all layers of the run side by side: one rotation for them all.
                flat = part.flatten(1, 2)
                part = self._rotate(flat, flat, *table)[1].view(part.shape)
            found.append((low, part))
        return found


def build_stacked_kv(shell: BaseShell, first_layer: int) -> StackedKV | None:
    """Stack the K/V projections of a base if its layers follow the Llama recipe.

    Args:
        shell: Shell of the base.
        first_layer: Lowest layer to stack.

    Returns:
        The stack, or None when the layers are built otherwise, adapted, quantised or offloaded. The
        result still has to be compared with the layers themselves.
    """
    parts = find_parts(shell, first_layer)
    if not parts:
        return None
    tensors = [tensor for part in parts for tensor in part.tensors()]
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1:
        return None
    if sum(t.numel() * t.element_size() for t in tensors) > MAX_BYTES:
        return None
    shapes = {(part.k_proj.weight.shape, part.v_proj.weight.shape) for part in parts}
    if len(shapes) != 1 or len(set(shapes.pop())) != 1:
        return None
    if len({_epsilon(part.norm) for part in parts}) != 1:
        return None
    if len({part.k_norm is None for part in parts}) != 1:
        return None
    if any(_scale(part.norm) is None for part in parts):
        return None
    if any(part.k_norm is not None and _scale(part.k_norm) is None for part in parts):
        return None
    return StackedKV(shell, first_layer, parts)


def find_parts(shell: BaseShell, first_layer: int) -> list[_Parts] | None:
    """The modules that K and V depend on in each layer, or None where the recipe is another."""
    found: list[_Parts] = []
    for i, layer in enumerate(list(shell.layers)[first_layer:], start=first_layer):
        attention = getattr(layer, "self_attn", None)
        norm = getattr(layer, "input_layernorm", None)
        if attention is None or norm is None or getattr(attention, "layer_idx", None) != i:
            return None
        k_proj: Any = getattr(attention, "k_proj", None)
        v_proj: Any = getattr(attention, "v_proj", None)
        k_norm = getattr(attention, "k_norm", None)
        if not (is_plain_linear(k_proj) and is_plain_linear(v_proj)):
            return None
        norms = [norm] if k_norm is None else [norm, k_norm]
        if not all(_is_rms_norm(module) for module in norms) or "forward" in attention.__dict__:
            return None
        if k_norm is not None and tuple(k_norm.weight.shape) != (attention.head_dim,):
            return None
        if _rotary_function(attention) is _no_rotation:
            return None
        rotary = bool(getattr(attention, "use_rope", True))
        found.append(_Parts(norm, k_proj, v_proj, k_norm, attention, rotary))
    return found


def _is_rms_norm(module: nn.Module) -> bool:
    if "RMSNorm" not in type(module).__name__ or not has_no_hooks(module):
        return False
    parameters = list(module.parameters())
    return len(parameters) == 1 and is_plain_tensor(getattr(module, "weight", None))


def _epsilon(norm: nn.Module) -> float:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(value) if value is not None else 0.0


def _normed(states: Tensor, eps: float) -> Tensor:
    wide = states.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(states.dtype)


@torch.no_grad()
def _scale(norm: nn.Module) -> Tensor | None:
    """What the norm multiplies by: its weight, or one plus its weight; None if neither fits."""
    weight = cast(Tensor, norm.weight)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((4, weight.shape[0]), generator=generator).to(weight.device, weight.dtype)
    found = norm(probe).float()
    plain = _normed(probe, _epsilon(norm)).float()
    for scale in (weight.float(), weight.float() + 1):
        if torch.allclose(found, plain * scale, rtol=2e-2, atol=2e-2):
            return scale
    return None


@torch.no_grad()
def _folded(part: _Parts) -> Tensor:
    scale = cast(Tensor, _scale(part.norm))
    weight = torch.cat([part.k_proj.weight, part.v_proj.weight])
    return (weight.float() * scale).to(weight.dtype)


@torch.no_grad()
def _biases(part: _Parts) -> Tensor:
    return torch.cat(
        [
            projection.weight.new_zeros(projection.out_features)
            if projection.bias is None
            else projection.bias.detach()
            for projection in (part.k_proj, part.v_proj)
        ]
    )


@torch.no_grad()
def _key_norms(parts: list[_Parts]) -> tuple[Tensor | None, float]:
    """Scales of the key norms `[layers, head_dim]` and their epsilon, or None without key norms."""
    if parts[0].k_norm is None:
        return None, 0.0
    scales = [cast(Tensor, _scale(cast(nn.Module, part.k_norm))) for part in parts]
    stacked = torch.stack(scales).to(parts[0].k_proj.weight.dtype)
    return stacked, _epsilon(parts[0].k_norm)


def _no_rotation(q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def _rotary_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rotation that the attention's own module defines."""
    home = sys.modules.get(type(attention).__module__)
    return cast(
        "Callable[..., tuple[Tensor, Tensor]]",
        getattr(home, "apply_rotary_pos_emb", _no_rotation),
    )
