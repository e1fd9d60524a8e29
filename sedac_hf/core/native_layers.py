"""Recognises decoder layers of the Llama recipe and describes them to the Rust core.

Recognition goes by structure: which modules a layer has and what they are, never by a model's name.
Whether the description is right is then settled by numbers, see `native_check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.core.weights import has_no_hooks, is_plain_linear, is_plain_tensor
from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf._core import LayerWeights, LinearWeights, MatrixWeights, NormWeights
    from sedac_hf.core.mlp_channels import MlpChannels

__all__ = [
    "LayerSetting",
    "describe_gated",
    "describe_layer",
    "describe_linear",
    "describe_matrix",
    "describe_norm",
]

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
# Names of the four norms by what the layer has: before and after attention, before and after the
# gated unit.
_PRE, _POST_ATTENTION = "input_layernorm", "post_attention_layernorm"
_BEFORE_MLP, _AFTER_MLP = "pre_feedforward_layernorm", "post_feedforward_layernorm"
_ARRANGEMENTS: dict[frozenset[str], tuple[str | None, str | None, str | None, str | None]] = {
    frozenset({_PRE, _POST_ATTENTION}): (_PRE, None, _POST_ATTENTION, None),
    frozenset({_POST_ATTENTION, _AFTER_MLP}): (None, _POST_ATTENTION, None, _AFTER_MLP),
    frozenset({_PRE, _POST_ATTENTION, _BEFORE_MLP, _AFTER_MLP}): (
        _PRE,
        _POST_ATTENTION,
        _BEFORE_MLP,
        _AFTER_MLP,
    ),
}


@dataclass(frozen=True)
class LayerSetting:
    """What a layer's modules do not say of it.

    Attributes:
        rotation: Which kind of rotary table it is given.
        window: Positions that it sees back to, itself included; None for all.
    """

    rotation: int
    window: int | None


def describe_matrix(weight: Tensor, rows: slice = slice(None)) -> MatrixWeights:
    """Where a matrix lies.

    Args:
        weight: A weight `[rows, columns]`.
        rows: A stretch of its rows.

    Returns:
        Address, rows, columns and type.

    Raises:
        NotNativeError: If it cannot be read in place.
    """
    part = weight.detach()[rows]
    if part.device.type != "cpu":
        raise NotNativeError(f"its weights are on {part.device}, the native pass needs the CPU")
    if part.dtype not in DTYPES or not is_plain_tensor(weight):
        raise NotNativeError(
            f"its weights are {type(weight).__name__} of {part.dtype}, expected plain tensors of "
            "float32, bfloat16 or float16"
        )
    if part.dim() != 2 or not part.is_contiguous():
        raise NotNativeError(f"a weight of shape {tuple(part.shape)} is not contiguous")
    return (part.data_ptr(), part.shape[0], part.shape[1], DTYPES[part.dtype])


def describe_linear(module: Any, name: str, rows: slice = slice(None)) -> LinearWeights:
    """A projection, or some rows of one.

    Args:
        module: The module.
        name: What it is called, for the reason of a refusal.
        rows: A stretch of its outputs.

    Returns:
        The matrix and the bias as f32, or None for it.

    Raises:
        NotNativeError: If it is no plain `nn.Linear`.
    """
    if not is_plain_linear(module):
        raise NotNativeError(
            f"{name} is {_kind(module)}, expected a plain nn.Linear (no adapter, quantisation, "
            "offloading or hook)"
        )
    bias = None
    if module.bias is not None:
        bias = _floats(module.bias.detach()[rows])
    return describe_matrix(module.weight, rows), bias


def describe_norm(module: Any, name: str) -> NormWeights:
    """A root-mean-square norm.

    Args:
        module: The module.
        name: What it is called, for the reason of a refusal.

    Returns:
        What it multiplies by, as f32, and its epsilon.

    Raises:
        NotNativeError: If it is something else.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        "RMSNorm" not in type(module).__name__
        or not has_no_hooks(module)
        or len(list(module.parameters())) != 1
        or not is_plain_tensor(weight)
        or eps is None
    ):
        raise NotNativeError(f"{name} is {_kind(module)}, expected a root-mean-square norm")
    scale = _scale(module, cast(Tensor, weight).detach(), float(eps))
    if scale is None:
        raise NotNativeError(f"{name} ({_kind(module)}) computes something else than x / rms * w")
    return _floats(scale), float(eps)


def describe_layer(layer: nn.Module, setting: LayerSetting) -> LayerWeights:
    """A decoder layer as the Rust core takes it.

    Args:
        layer: The layer.
        setting: What its modules do not say.

    Returns:
        The description; it holds addresses of the layer's weights.

    Raises:
        NotNativeError: If the layer is built otherwise.
    """
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise NotNativeError(f"{type(layer).__name__} has no self_attn or no mlp")
    _check_children(layer, {"self_attn", "mlp", _PRE, _POST_ATTENTION, _BEFORE_MLP, _AFTER_MLP})
    _check_children(attention, _ATTENTION)
    _check_children(mlp, _MLP)
    names = [name for name, _ in layer.named_children() if name.endswith("layernorm")]
    arrangement = _ARRANGEMENTS.get(frozenset(names))
    if arrangement is None:
        raise NotNativeError(f"{type(layer).__name__} has the norms {names}, an unknown order")
    norms = [None if n is None else describe_norm(getattr(layer, n), n) for n in arrangement]
    gate, up = _gated(mlp)
    gated: dict[str, Any] = {
        "gate": gate,
        "up": up,
        "down": describe_linear(mlp.down_proj, "down_proj"),
        "activation": _activation(mlp),
    }
    places = ("before_attention", "after_attention", "before_mlp", "after_mlp")
    whole = {**dict(zip(places, norms, strict=True)), **_attention(attention, setting), **gated}
    return cast("LayerWeights", whole)


def describe_gated(channels: MlpChannels) -> dict[str, LinearWeights]:
    """Gate, up and down of a gated unit that is given by its channels.

    Args:
        channels: The channels; they must be kept as long as what is returned.

    Raises:
        NotNativeError: If there is no gate, or a weight cannot be read.
    """
    if channels.gate is None:
        raise NotNativeError("its MLP has no gate")
    pairs = {"gate": channels.gate, "up": channels.up, "down": channels.down}
    return {
        name: (describe_matrix(weight), None if bias is None else _floats(bias))
        for name, (weight, bias) in pairs.items()
    }


def _attention(module: Any, setting: LayerSetting) -> dict[str, Any]:
    """The entries that attention is described by."""
    dim = int(getattr(module, "head_dim", 0))
    group = int(getattr(module, "num_key_value_groups", 0))
    output = describe_linear(getattr(module, "o_proj", None), "o_proj")
    scaling = getattr(module, "scaling", None)
    if dim < 1 or group < 1 or scaling is None or not getattr(module, "is_causal", False):
        raise NotNativeError(f"{type(module).__name__} is no causal attention with grouped heads")
    queries = output[0][2]
    kv = queries // group
    if hasattr(module, "qkv_proj"):
        ends = (queries, queries + kv, queries + 2 * kv)
        starts = (0, *ends[:2])
        fused = module.qkv_proj
        parts = [
            describe_linear(fused, "qkv_proj", slice(start, end))
            for start, end in zip(starts, ends, strict=True)
        ]
    else:
        names = ("q_proj", "k_proj", "v_proj")
        parts = [describe_linear(getattr(module, name, None), name) for name in names]
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    cap = getattr(module, "attn_logit_softcapping", None)
    return {
        "query": parts[0],
        "key": parts[1],
        "value": parts[2],
        "query_norm": None if norms[0] is None else describe_norm(norms[0], "q_norm"),
        "key_norm": None if norms[1] is None else describe_norm(norms[1], "k_norm"),
        "rotation": setting.rotation if getattr(module, "use_rope", True) else None,
        "kv_heads": kv // dim,
        "head_dim": dim,
        "group": group,
        "scaling": float(scaling),
        "softcap": None if cap is None else float(cap),
        "window": setting.window,
        "output": output,
    }


def _gated(mlp: Any) -> tuple[LinearWeights, LinearWeights]:
    if hasattr(mlp, "gate_up_proj"):
        inner = mlp.gate_up_proj.out_features // 2 if is_plain_linear(mlp.gate_up_proj) else 0
        halves = (slice(0, inner), slice(inner, 2 * inner))
        gate, up = (describe_linear(mlp.gate_up_proj, "gate_up_proj", half) for half in halves)
        return gate, up
    gate, up = (
        describe_linear(getattr(mlp, name, None), name) for name in ("gate_proj", "up_proj")
    )
    return gate, up


@torch.no_grad()
def _activation(mlp: Any) -> str:
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if callable(function):
        probe = torch.linspace(-6, 6, 101)
        found = function(probe)
        for name, known in (
            ("silu", functional.silu(probe)),
            ("gelu_tanh", functional.gelu(probe, approximate="tanh")),
        ):
            # The exact GELU is further away than this from its approximation.
            if torch.allclose(found, known, rtol=1e-6, atol=1e-6):
                return name
    raise NotNativeError(f"{_kind(function)} is neither SiLU nor GELU by its tanh approximation")


def _check_children(module: nn.Module, known: set[str]) -> None:
    """Refuse a module that does more than its known parts, or that does it through hooks."""
    name = type(module).__name__
    if not has_no_hooks(module):
        raise NotNativeError(f"{name} carries a hook or a forward of its own")
    own = [key for key, _ in module.named_parameters(recurse=False)]
    other = [
        key
        for key, child in module.named_children()
        if key not in known and not isinstance(child, (nn.Dropout, nn.Identity))
    ]
    if own or other:
        raise NotNativeError(f"{name} has parts that the native pass does not know: {own + other}")


@torch.no_grad()
def _scale(norm: nn.Module, weight: Tensor, eps: float) -> Tensor | None:
    """What the norm multiplies by: its weight or one plus its weight; None if neither fits."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((4, weight.shape[0]), generator=generator).to(weight.device, weight.dtype)
    found, wide = norm(probe).float(), probe.float()
    plain = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
    for scale in (weight.float(), weight.float() + 1):
        if torch.allclose(found, plain * scale, rtol=tolerance, atol=tolerance):
            return scale
    return None


def _floats(tensor: Tensor) -> Any:
    return np.array(tensor.float().contiguous().numpy(), dtype=np.float32)


def _kind(module: object) -> str:
    return "missing" if module is None else f"a {type(module).__name__}"
