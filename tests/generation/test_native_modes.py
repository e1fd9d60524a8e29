"""Modes over the native pass: what they say is what they say over the base's modules."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import RowPass
from sedac_hf.generation.core_cycles import CoreCycles
from tests.generation.test_settled import settled
from tests.native import step_by_step
from tests.tiny_models import VOCABULARY, build_tiny
from tests.wrapping import wrap

NATIVE = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "olmo2", "gemma2", "gemma3")
GIVEN: dict[str, Any] = {
    "max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None, "do_sample": False,
}  # fmt: skip


def padded(rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
        ids[row, : row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each native call of layers, and of each whole cycle, from now on."""
    calls: list[int] = []
    run, cycle = NativePass.layers, CoreCycles.run

    def counted(self: NativePass, hidden: torch.Tensor, *rest: Any, **values: Any) -> torch.Tensor:
        calls.append(int(hidden.shape[1]))
        return run(self, hidden, *rest, **values)

    def counted_cycle(self: CoreCycles, *rest: Any, **values: Any) -> Any:
        outcomes = cycle(self, *rest, **values)
        calls.extend(outcome.nodes for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(NativePass, "layers", counted)
    monkeypatch.setattr(CoreCycles, "run", counted_cycle)
    return calls


@pytest.mark.parametrize("mode", ["exact", "plain"])
@pytest.mark.parametrize("architecture", NATIVE)
def test_tokens_are_those_of_the_base(architecture: str, mode: str, seen: list[int]) -> None:
    base = build_tiny(architecture)
    model = wrap(base, {-1: "feedback", 1: "block"})
    given = padded()
    expected = base.generate(**given, **GIVEN)
    seen.clear()
    assert torch.equal(model.generate(**given, **GIVEN, sedac_mode=mode), expected)
    assert len(seen) > 3


@pytest.mark.parametrize("architecture", NATIVE)
def test_certified_exits_are_those_of_the_modules(
    architecture: str, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = settled("feedback", architecture=architecture), padded()
    found = []
    for name in ("auto", "modules"):
        monkeypatch.setenv("SEDAC_PASS", name)
        model._assembly = None
        seen.clear()
        out = model.generate(**given, **GIVEN, sedac_mode="certified", return_dict_in_generate=True)
        found.append((out.sequences.tolist(), out.exit_layers.tolist()))
        assert bool(seen) == (name == "auto")
    assert found[0] == found[1]
    assert any(layer < 4 for row in found[0][1] for layer in row)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_every_kind_of_cache_serves(architecture: str, implementation: str) -> None:
    base = build_tiny(architecture)
    model, given = wrap(base, {-1: "feedback"}), padded()
    expected = base.generate(**given, **GIVEN, cache_implementation=implementation)
    for mode in ("exact", "plain"):
        found = model.generate(
            **given, **GIVEN, cache_implementation=implementation, sedac_mode=mode
        )
        assert torch.equal(found, expected)


def test_a_cache_goes_out_and_comes_back() -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded(1)
    whole = base.generate(**given, **GIVEN)
    half = {**GIVEN, "max_new_tokens": 7}
    cache = DynamicCache(config=base.config)
    first = model.generate(**given, **half, past_key_values=cache, sedac_mode="exact")
    assert cache.get_seq_length() == first.shape[1] - 1
    second = model.generate(first, **half, past_key_values=cache, sedac_mode="exact")
    assert torch.equal(second, whole)


def test_a_change_of_weights_is_seen_by_the_next_call(seen: list[int]) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded(1)
    model.generate(**given, **GIVEN, sedac_mode="exact")
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.mul_(-3.0)
    expected = base.generate(**given, **GIVEN)
    seen.clear()
    assert torch.equal(model.generate(**given, **GIVEN, sedac_mode="exact"), expected)
    assert seen


def test_a_hook_sends_calls_back_to_the_modules(seen: list[int]) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded(1)
    model.generate(**given, **GIVEN, sedac_mode="exact")
    with torch.no_grad():
        handle = base.model.layers[1].register_forward_hook(lambda *a: a[-1] * 1.5)
    expected = base.generate(**given, **GIVEN)
    seen.clear()
    assert torch.equal(model.generate(**given, **GIVEN, sedac_mode="exact"), expected)
    assert not seen
    assert model.exit_stats.runs_on == "modules"
    assert "hook" in model.exit_stats.runs_on_reason
    handle.remove()
    model.generate(**given, **GIVEN, sedac_mode="exact")
    assert (model.exit_stats.runs_on, model.exit_stats.runs_on_reason) == ("native", "")


def test_sampling_draws_the_same_tokens_as_the_base() -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded()
    drawn = []
    for lm, more in ((base, {}), (model, {"sedac_mode": "exact"})):
        torch.manual_seed(11)
        drawn.append(lm.generate(**given, **{**GIVEN, "do_sample": True}, **more))
    assert torch.equal(drawn[0], drawn[1])


def test_the_pass_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(build_tiny("llama"), {-1: "feedback"})
    choice = model.pass_choice()
    assert (choice.name, choice.reason) == ("native", "")
    assert choice.build is not None
    run: RowPass = choice.build(model.assembly.parts)
    assert isinstance(run, NativePass)
    monkeypatch.setenv("SEDAC_PASS", "modules")
    model._assembly = None
    assert model.pass_choice().name == "modules"


@pytest.mark.parametrize("mode", ["exact", "plain"])
def test_the_native_pass_can_be_disabled_for_a_while(mode: str, seen: list[int]) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded()
    expected = base.generate(**given, **GIVEN)
    with model.native_disabled():
        assert torch.equal(model.generate(**given, **GIVEN, sedac_mode=mode), expected)
    assert not seen
    assert model.exit_stats.runs_on == "modules"
    assert "disabled" in model.exit_stats.runs_on_reason
    assert torch.equal(model.generate(**given, **GIVEN, sedac_mode=mode), expected)
    assert seen
    assert model.exit_stats.runs_on == "native"


def test_a_call_that_no_pass_serves_says_why() -> None:
    model, given = wrap(build_tiny("llama"), {-1: "feedback"}), padded(1)
    model.generate(
        **given, **GIVEN, sedac_mode="exact", return_dict_in_generate=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert model.exit_stats.runs_on == "modules"
    assert "hidden states" in model.exit_stats.runs_on_reason


@pytest.mark.parametrize("in_core", [True, False])
@pytest.mark.parametrize("mode", ["exact", "plain"])
@pytest.mark.parametrize("least", ["min_new_tokens", "min_length"])
def test_a_least_length_holds_without_looking_at_all_logits(
    mode: str, least: str, in_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded()
    free = base.generate(**given, **GIVEN)[:, 6:]
    # Words that rows would say early on end the text, once it may end.
    length = 9 + (6 if least == "min_length" else 0)
    values = {**GIVEN, "eos_token_id": free[:, 2].tolist(), least: length}
    expected = base.generate(**given, **values)
    model.generate(**given, **GIVEN, sedac_mode=mode)  # the pass has been admitted
    looks: list[int] = []
    logits = NativePass.logits

    def counted(self: NativePass, hidden: torch.Tensor) -> torch.Tensor:
        looks.append(int(hidden.shape[1]))
        return logits(self, hidden)

    monkeypatch.setattr(NativePass, "logits", counted)
    with nullcontext() if in_core else step_by_step():
        assert torch.equal(model.generate(**given, **values, sedac_mode=mode), expected)
    assert not torch.equal(expected[:, 6:20], free), "the least length has changed the text"
    assert len(looks) == 1 if in_core else 1 < len(looks) < 1 + 9 * 3
    looks.clear()
    model.generate(**given, **GIVEN, sedac_mode=mode)
    assert len(looks) == 1, "the prompt's alone"
