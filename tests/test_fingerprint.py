from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.fingerprint import compare, dtype_label, fingerprint, is_quantised

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms begin as ones: no two models would differ in them
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100))


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4)
    )


def moe() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8)
    )


@pytest.mark.parametrize("build", [llama, gpt2, opt, moe])
def test_every_part_is_hashed_and_repeatable(build) -> None:
    model = build()
    first = fingerprint(model)
    assert all(first["weights"].values())
    assert fingerprint(model) == first
    assert compare(first, fingerprint(copy.deepcopy(model))).same_weights


@pytest.mark.parametrize("tied", [False, True])
def test_same_for_bfloat16_float16_and_float32_of_the_same_weights(tied: bool) -> None:
    stored = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    expected = fingerprint(stored)
    assert fingerprint(copy.deepcopy(stored).float()) == expected
    assert fingerprint(copy.deepcopy(stored).half()) == expected


def test_float32_weights_rounded_on_loading_give_the_same() -> None:
    model = llama()
    expected = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == expected


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.norm.weight", "norms"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("lm_head.weight", "head"),
        ("model.layers.3.mlp.down_proj.weight", "layers"),
        ("model.layers.2.self_attn.k_proj.weight", "layers"),
    ],
)
def test_other_weights_are_told_apart_and_named(name: str, part: str) -> None:
    model = llama()
    expected = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.02)
    match = compare(expected, fingerprint(model))
    assert match.same_shape
    assert not match.same_weights
    assert match.weight_differences == (part,)


def test_other_shape_is_named_field_by_field() -> None:
    match = compare(fingerprint(llama()), fingerprint(llama(hidden_size=64, vocab_size=120)))
    assert not match.same_shape
    assert not match.same_weights
    assert match.shape_differences["hidden_size"] == (32, 64)
    assert match.shape_differences["vocab_size"] == (100, 120)


def test_other_architecture_is_another_shape() -> None:
    match = compare(fingerprint(llama()), fingerprint(gpt2()))
    assert match.shape_differences["model_type"] == ("llama", "gpt2")


def test_quantised_base_matches_by_norms_and_head() -> None:
    model = llama()
    expected = fingerprint(model)
    for layer in model.model.layers:
        packed = torch.zeros(4, 4, dtype=torch.uint8)
        layer.mlp.down_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gptq"}
    found = fingerprint(model)
    assert is_quantised(model)
    assert dtype_label(model) == "float32/gptq"
    assert found["weights"]["layers"] is None
    match = compare(expected, found)
    assert match.same_weights
    assert match.not_compared == ("layers",)


def test_unreadable_weights_never_count_as_equal() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    found = fingerprint(model)
    assert found["weights"] == {"norms": None, "head": None, "layers": None}
    assert not compare(found, found).same_weights


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("tied", [False, True])
def test_same_when_accelerate_offloads_the_base(where: str, tied: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model = llama(tie_word_embeddings=tied)
    expected = fingerprint(model)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert fingerprint(model) == expected
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"


def test_adapters_make_another_model_but_leave_the_shape() -> None:
    from peft import LoraConfig, get_peft_model

    model = llama()
    expected = fingerprint(model)
    adapted: PreTrainedModel = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    match = compare(expected, fingerprint(adapted))
    assert match.same_shape
    assert match.weight_differences == ("layers",)


def test_taking_it_changes_nothing() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    fingerprint(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_a_layer_list_is_refused() -> None:
    model = llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="list of 7 decoder layers"):
        fingerprint(model)
