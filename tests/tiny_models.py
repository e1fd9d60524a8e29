"""Tiny random models of the architectures that the wrapper is tested on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
LAYERS = 4
WIDTH = 32
WINDOW = 6

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "smollm3": ("SmolLM3", {**_GROUPED, "no_rope_layer_interval": 2}),
    "gpt2": ("GPT2", {**_COMMON, "n_inner": 48, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {**_COMMON, "intermediate_size": 48}),
    "opt": (
        "OPT",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": True},
    ),
    "falcon": ("Falcon", {**_COMMON, "multi_query": True, "alibi": False, "bias": False}),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

ARCHITECTURES = tuple(_CONFIGS)

# Bases whose attention goes by slots: positions as a bias of the scores (ALiBi), windows and chunks
# that are counted in slots. They cannot be given a mask of a tree.
_BY_SLOT: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", _COMMON),
    "falcon-alibi": ("Falcon", {**_COMMON, "multi_query": True, "alibi": True, "bias": True}),
    "mpt": (
        "Mpt",
        {
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "max_seq_len": 128,
            "use_cache": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-neo": (
        "GPTNeo",
        {
            **_COMMON,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], LAYERS // 2]],
            "window_size": WINDOW,
        },
    ),
    "llama4": (
        "Llama4",
        {
            **_GROUPED,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
        },
    ),
}
BY_SLOT = tuple(_BY_SLOT)


def build_tiny(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A tiny random causal LM in evaluation mode.

    Args:
        name: One of `ARCHITECTURES` or `BY_SLOT`.
        seed: Seed of its weights.
        dtype: Type of its weights.
        **changes: Fields of its configuration to change.
    """
    stem, values = {**_CONFIGS, **_BY_SLOT}[name]
    kind = f"{stem}Text" if stem in ("Gemma3", "Llama4") else stem
    config = getattr(transformers, f"{kind}Config")(**{**values, **changes})
    suffix = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{stem}{suffix}")(config)
        _spread(model)
    return model.to(dtype).eval()


def _spread(model: PreTrainedModel) -> None:
    """Make the weights large enough that layers matter, and every norm and bias its own."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6.0 if "embed" not in name and "wte" not in name else 3.0)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def prompt(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids `[rows, length]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
