"""Architectures beyond those of the fixtures: other masks, caches and ways to build a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from sedac_hf.errors import ConfigError
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, prompt
from tests.wrapping import generated, spec_of, wrap

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA_LIKE = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# What each adds: positions as a bias of the mask; tuples and a bare index; another name for it;
# latent attention; attention sinks; rotary tables on some layers only; a decoder found elsewhere.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Bloom": _SIZES,
    "GPTJ": {**_SIZES, "n_inner": 48, "rotary_dim": 4},
    "GPTNeo": {
        **_SIZES,
        "intermediate_size": 48,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 6,
    },
    "DeepseekV3": {
        **_SIZES,
        **_LATENT,
        **_EXPERTS,
        "intermediate_size": 48,
        "num_key_value_heads": 4,
    },
    "GptOss": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Cohere2": {**_LLAMA_LIKE, "sliding_window": 6},
    "ModernBertDecoder": {**_SIZES, "intermediate_size": 48, "local_attention": 6},
    "StableLm": {**_LLAMA_LIKE, "use_qkv_bias": True},
}


def built(stem: str) -> PreTrainedModel:
    config = getattr(transformers, f"{stem}Config")(**_CONFIGS[stem])
    return getattr(transformers, f"{stem}ForCausalLM")(config).float().eval()


@pytest.mark.parametrize("stem", _CONFIGS)
def test_exits_decode_what_the_simulation_says(stem: str) -> None:
    base = built(stem)
    ids = prompt(2, 5)
    model = wrap(base, {0: "lens", 1: "block"}, self_check=True)
    model.set_cascade(None)
    expected = base.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    plain = model.generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=None, sedac_mode="plain"
    )
    assert torch.equal(plain, expected)
    model = wrap(base, {1: "block"})
    output = generated(model, ids)
    assert (output.exit_layers[:, 1:] == 1).all()
    cache = output.past_key_values
    assert len({int(cache.get_seq_length(i)) for i in range(len(cache.layers))}) == 1
    simulated = model(output.sequences[:, :-1], exits="simulate", exit_start=5)
    logits = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(simulated.logits[:, 4:], logits, rtol=1e-3, atol=1e-4)


def test_layers_that_need_more_than_a_configuration_make_no_blocks() -> None:
    config = transformers.MoshiConfig(
        **{**_LLAMA_LIKE, "ffn_dim": 48, "audio_vocab_size": 16, "num_codebooks": 2}
    )
    base = transformers.MoshiForCausalLM(config).eval()
    with pytest.raises(ConfigError, match="no exit block can be made of its kind; use head='lens'"):
        SedacForCausalLM.from_base(base, [spec_of(1, "block")])
