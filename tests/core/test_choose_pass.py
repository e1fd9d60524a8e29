"""Which models get a pass for trees, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from sedac_hf.core import choose_pass as module
from sedac_hf.core.choose_pass import choose_pass
from sedac_hf.core.module_pass import ModulePass
from tests.tiny_models import build_tiny
from tests.wrapping import wrap

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the base's own modules; tests of the native pass have files of their own."""
    monkeypatch.setenv("SEDAC_PASS", "modules")


def test_every_architecture_has_one(tiny: PreTrainedModel) -> None:
    parts = wrap(tiny, {1: "block"}).assembly.parts
    choice = choose_pass(parts)
    assert (choice.name, choice.reason) == ("modules", "SEDAC_PASS=modules is set")
    assert choice.build is not None
    assert isinstance(choice.build(parts), ModulePass)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_decide(dtype: torch.dtype) -> None:
    assert choose_pass(wrap(build_tiny("llama", dtype=dtype)).assembly.parts).name == "modules"


def biased(name: str) -> PreTrainedModel:
    """A model whose positions are a bias of its attention scores (ALiBi)."""
    if name == "falcon":
        return build_tiny("falcon", alibi=True)
    if name == "mpt":
        config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=4, vocab_size=96)
        return transformers.MptForCausalLM(config).eval()
    return transformers.BloomForCausalLM(transformers.BloomConfig(**_SIZES)).eval()


@pytest.mark.parametrize("name", ["bloom", "falcon", "mpt"])
def test_positions_by_slot_are_named_as_the_reason(name: str) -> None:
    choice = choose_pass(wrap(biased(name)).assembly.parts)
    assert (choice.name, choice.build) == ("none", None)
    assert "ForCausalLM" in choice.reason


def test_attention_by_slots_is_named_as_the_reason() -> None:
    config = transformers.GPTNeoConfig(
        **{"vocab_size": 96, "hidden_size": 32, "num_layers": 4, "num_heads": 4},
        attention_types=[[["global", "local"], 2]],
        intermediate_size=48,
    )
    choice = choose_pass(wrap(transformers.GPTNeoForCausalLM(config).eval()).assembly.parts)
    assert "limits attention by slots" in choice.reason


def test_an_attention_that_takes_no_mask_is_named_as_the_reason(llama: PreTrainedModel) -> None:
    model = wrap(llama)
    llama.config._attn_implementation = "flash_attention_2"
    assert "takes no mask of a tree" in choose_pass(model.assembly.parts).reason


def test_nodes_that_come_out_wrong_are_noticed(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings_seen = ((1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 0, 1))
    monkeypatch.setattr(module, "_PARENTS_SEEN", siblings_seen)
    choice = choose_pass(wrap(llama).assembly.parts)
    assert "come out otherwise than their paths alone" in choice.reason
