"""Which models get a pass for trees, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf.core import pass_checks as module
from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.choose_pass import CallPass, PassChoice, PassChoices
from sedac_hf.core.decoder_loop import ExitParts
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.pass_checks import chain_reason, tree_reason
from sedac_hf.core.row_cache import RowCache
from sedac_hf.core.row_pass import RowPass
from sedac_hf.errors import NotNativeError
from tests.tiny_models import BY_SLOT, build_tiny
from tests.wrapping import wrap


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the base's own modules; tests of the native pass have files of their own."""
    monkeypatch.setenv("SEDAC_PASS", "modules")


def choose_pass(parts: ExitParts) -> PassChoice:
    return PassChoices(parts).best()


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


# --------------------------------------------------------------------- where the native one refuses


def refuse(run: RowPass) -> str:
    """A task that only the modules can do."""
    if isinstance(run, NativePass):
        raise NotNativeError("something has changed")
    return type(run).__name__


def test_what_the_native_pass_refuses_is_done_over_the_modules(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEDAC_PASS")
    parts = wrap(llama, {1: "block"}).assembly.parts
    choices = PassChoices(parts)
    best = choices.best()
    call = CallPass(choices, best, parts)
    first, name = call.begin(lambda run: type(run).__name__)
    assert (name, call.choice) == ("NativePass", best)
    assert call.begin(lambda run: run)[0] is first, "one pass serves the whole call"
    second, name = call.begin(refuse)
    assert name == "ModulePass"
    assert (call.choice.name, call.choice.reason) == ("modules", "something has changed")
    assert call.begin(lambda run: run)[0] is second
    # What is known of the one pass's speed says nothing of the other's.
    assert call.choice.governors is choices.modules("").governors is not best.governors


def test_a_refusal_stands_where_the_modules_can_hold_nothing_either(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEDAC_PASS")
    parts = wrap(llama, {1: "block"}).assembly.parts
    choices = PassChoices(parts)
    call = CallPass(choices, choices.best(), parts)
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotNativeError, match="something has changed"):
        call.begin(refuse)
