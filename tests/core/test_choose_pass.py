"""Which models get a pass for trees, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf.core import pass_checks as module
from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.choose_pass import choose_pass
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.pass_checks import chain_reason, tree_reason
from sedac_hf.core.row_cache import RowCache
from tests.tiny_models import BY_SLOT, build_tiny
from tests.wrapping import wrap


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


@pytest.mark.parametrize("name", BY_SLOT)
def test_attention_by_slots_is_served_chains(name: str) -> None:
    parts = wrap(build_tiny(name)).assembly.parts
    choice = choose_pass(parts)
    assert choice.name == "modules"
    assert choice.build is not None
    assert isinstance(choice.build(parts), ChainPass)
    assert "ForCausalLM" in choice.reason, "why there are no trees"
    assert chain_reason(parts) is None


def test_attention_by_slots_is_named_as_the_reason() -> None:
    choice = choose_pass(wrap(build_tiny("gpt-neo")).assembly.parts)
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
    reason = tree_reason(wrap(llama).assembly.parts)
    assert reason is not None
    assert "nodes of a tree come out otherwise than their paths alone" in reason


def test_a_base_that_can_hold_nothing_runs_without_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        RowCache, "shift", lambda *args: None
    )  # rows that parted stay where they are
    choice = choose_pass(wrap(build_tiny("bloom")).assembly.parts)
    assert (choice.name, choice.build) == ("none", None)
    assert "nodes of a chain come out otherwise" in choice.reason
    assert choice.reason.endswith("It runs without drafts.")
