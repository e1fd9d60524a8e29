"""Which base models early exit can work on, and where their decoder layers are."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sedac_hf.core.cache_names import CACHE_NAMES, cache_name
from sedac_hf.errors import UnsupportedModelError

__all__ = [
    "check_supported",
    "find_cache_argument",
    "find_decoder",
    "head_dim_of",
    "module_device",
    "module_path",
    "own_draw",
    "unwrap_adapter",
]

_LAYER_CACHE_NAMES = (*CACHE_NAMES, "layer_past", "past_key_value")
# Layer types that keep plain K/V of every position, so that a skipped layer can be filled in.
_FILLABLE = {"full_attention", "sliding_attention", "chunked_attention", "sparse", "dense"}


def unwrap_adapter(base: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, adapters in place.

    Args:
        base: A causal LM, or a `PeftModel` around one.

    Returns:
        The causal LM itself.

    Raises:
        UnsupportedModelError: If the adapter works on the prompt rather than in the layers.
    """
    configs: dict[str, Any] | None = getattr(base, "peft_config", None)
    get_base = getattr(base, "get_base_model", None)
    if configs is None or get_base is None:
        return base
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise UnsupportedModelError(
            "The base carries a prompt-learning adapter, whose virtual tokens are added outside "
            "the decoder. Use an adapter that lives in the layers (such as LoRA), or merge it."
        )
    return cast(nn.Module, get_base())


def check_supported(base: nn.Module) -> None:
    """Refuse, by name, models in which a layer cannot be skipped and filled in later.

    Args:
        base: The model to wrap.

    Raises:
        UnsupportedModelError: If it is not a decoder-only causal LM with plain K/V.
    """
    name = type(base).__name__
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_decoder"):
        raise UnsupportedModelError(
            f"Expected a transformers causal LM (PreTrainedModel), found {name}. Load the base "
            "with AutoModelForCausalLM.from_pretrained."
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder (or has cross-attention). Early exit here is for "
            "decoder-only models."
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(base, "_is_stateful", False) or "linear_attention" in layer_types:
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state (Mamba or linear attention). A skipped layer would "
            "lose it, so exits are refused; use a model with attention in every layer."
        )
    if unknown := sorted(layer_types - _FILLABLE):
        raise UnsupportedModelError(
            f"{name} has layers of type {unknown}, whose cache cannot be filled from an exited "
            f"state. Supported types: {sorted(_FILLABLE)}."
        )
    if "reuse" in set(getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModelError(
            f"{name} shares K/V between layers through side channels, which exits cannot fill yet."
        )
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"{name} is a composite (multimodal) model. Pass its text model as a causal LM instead."
        )


def find_decoder(base: nn.Module) -> tuple[nn.Module, str]:
    """The module that owns the decoder layers, and the attribute that lists them.

    Args:
        base: A supported causal LM.

    Returns:
        The decoder and the name of its `nn.ModuleList` of layers.

    Raises:
        UnsupportedModelError: If no list of `num_hidden_layers` modules is found.
    """
    depth = int(cast(Any, base).config.num_hidden_layers)
    decoder: nn.Module = cast(Any, base).get_decoder()
    # A few models answer get_decoder with something else; then it is another model inside the base.
    others = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
    for candidate in (decoder, *others):
        if (name := _layer_list(candidate, depth)) is not None:
            return candidate, name
    lists = {
        name: len(child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList)
    }
    raise UnsupportedModelError(
        f"{type(base).__name__}: looked in {type(decoder).__name__} for a list of {depth} decoder "
        f"layers (config.num_hidden_layers), found {lists or 'no module list'}."
    )


def _layer_list(decoder: nn.Module, depth: int) -> str | None:
    """Name of the child that lists `depth` layers; None if there is none or it is not clear."""
    found = [
        name
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth and depth > 0
    ]
    known = [name for name in ("layers", "h", "blocks") if name in found]
    if len(found) == 1 or known:
        return known[0] if known else found[0]
    return None


def module_path(root: nn.Module, target: nn.Module) -> list[str]:
    """Attribute names that lead from one module to another.

    Args:
        root: Where the path starts.
        target: A module inside `root`, or `root` itself.

    Returns:
        The names, empty when both are the same.

    Raises:
        UnsupportedModelError: If `target` is not inside `root`.
    """
    for name, module in root.named_modules():
        if module is target:
            return name.split(".") if name else []
    raise UnsupportedModelError(
        f"{type(target).__name__} is not a sub-module of {type(root).__name__}, so the base's "
        "forward cannot be led through it."
    )


def find_cache_argument(layer: nn.Module, decoder: nn.Module) -> tuple[str, int]:
    """How a decoder layer takes its cache.

    Args:
        layer: A decoder layer.
        decoder: The module that calls it.

    Returns:
        Name of the parameter and its place among the arguments after the hidden state.

    Raises:
        UnsupportedModelError: If no known name is among the parameters.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[2:]
    for name in _LAYER_CACHE_NAMES:
        if name in names:
            return name, names.index(name)
    if "kwargs" in names:  # handed on under the decoder's own name
        return cache_name(type(decoder).forward), len(names)
    raise UnsupportedModelError(
        f"{type(layer).__name__}.forward takes none of {_LAYER_CACHE_NAMES}; found {names}."
    )


def module_device(module: nn.Module) -> torch.device:
    """Where a module computes, also when its weights are offloaded between calls.

    Args:
        module: A module of the base.

    Returns:
        The device that accelerate's hooks bring its weights to, else that of its parameters.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def head_dim_of(config: Any) -> int:
    """Width of an attention head by the configuration of a text model."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def own_draw(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block generators can be seeded and drawn from without a trace outside of it.

    Args:
        device: Where the block draws, beside the CPU.
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
