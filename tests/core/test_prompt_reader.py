"""Prompts through the native pass leave behind what the base leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sedac_hf.core import prompt_reader
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.prompt_reader import PromptReader
from sedac_hf.generation.cycle import Cycle
from sedac_hf.generation.governor import Governor
from tests.generation.test_core_cycles import cycles as cycles
from tests.generation.test_native_modes import GIVEN, NATIVE, padded
from tests.generation.test_settled import settled
from tests.native import step_by_step
from tests.tiny_models import VOCABULARY, build_tiny
from tests.wrapping import wrap

MODES = ("exact", "plain", "certified")


def long(rows: int = 3, length: int = 40) -> dict[str, torch.Tensor]:
    """Prompts beyond one chunk, with paddings on both sides of a chunk's end."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, hidden in enumerate((0, 5, 27)[:rows]):
        mask[row, :hidden] = 0
        ids[row, :hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each forward that a reader has answered from now on."""
    counts: list[int] = []
    read = PromptReader.__call__

    def counted(self: PromptReader, arguments: dict[str, Any]) -> Any:
        given = arguments.get("input_ids", arguments.get("inputs_embeds"))
        counts.append(int(given.shape[1]))
        return read(self, arguments)

    monkeypatch.setattr(PromptReader, "__call__", counted)
    return counts


@pytest.mark.parametrize("mode", ["exact", "plain"])
@pytest.mark.parametrize("architecture", NATIVE)
def test_long_padded_prompts_go_on_as_in_the_base(
    architecture: str, mode: str, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_reader, "_CHUNK", 48)
    base = build_tiny(architecture)
    model, given = wrap(base, {-1: "feedback", 1: "block"}), long()
    expected = base.generate(**given, **GIVEN)
    assert torch.equal(model.generate(**given, **GIVEN, sedac_mode=mode), expected)
    assert reads == [40]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [{-1: "feedback", 1: "block"}, {1: "block"}, {1: "lens"}])
def test_a_cache_comes_back_as_the_modules_fill_it(
    heads: dict[int, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = wrap(build_tiny("llama"), heads), long()
    caches = []
    for name in ("auto", "modules"):
        monkeypatch.setenv("SEDAC_PASS", name)
        model._assembly = None
        found = model.generate(**given, **GIVEN, sedac_mode=mode, return_dict_in_generate=True)
        caches.append((found.sequences, found.past_key_values))
    (tokens, mine), (expected, theirs) = caches
    assert torch.equal(tokens, expected)
    length = theirs.get_seq_length()
    assert length == tokens.shape[1] - 1
    assert len(mine.layers) == len(theirs.layers)
    for ours, own in zip(mine.layers, theirs.layers, strict=True):
        assert ours.get_seq_length() == own.get_seq_length()
        for row, hidden in enumerate((0, 5, 27)):
            torch.testing.assert_close(ours.keys[row, :, hidden:], own.keys[row, :, hidden:])
            torch.testing.assert_close(ours.values[row, :, hidden:], own.values[row, :, hidden:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prompt_has_the_same_bits_whole_in_parts_and_in_company(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(build_tiny("llama").to(dtype), {-1: "feedback", 1: "block"})
    given = long()
    once = {**GIVEN, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}

    def logits(**more: Any) -> torch.Tensor:
        return model.generate(**more, **once, sedac_mode="plain").logits[0]

    whole = logits(**given)
    for row, hidden in enumerate((0, 5, 27)):
        assert torch.equal(
            logits(input_ids=given["input_ids"][row : row + 1, hidden:])[0], whole[row]
        )
    for chunk in (1, 7, 200):
        monkeypatch.setattr(prompt_reader, "_CHUNK", chunk)
        monkeypatch.setattr(prompt_reader, "_LEAST", 1)
        assert torch.equal(logits(**given), whole)
    cache = DynamicCache(config=model.base_lm.config)
    alone = given["input_ids"][:1]
    logits(input_ids=alone[:, :19], past_key_values=cache)
    assert torch.equal(logits(input_ids=alone, past_key_values=cache)[0], whole[0])


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "bare": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_goes_on_where_it_was_left(mode: str, kind: str) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback", 1: "block"}), long(1)["input_ids"]
    whole = model.generate(given, **GIVEN, sedac_mode=mode)
    cache = CACHES[kind](base.config)
    half = {**GIVEN, "max_new_tokens": 7, "past_key_values": cache, "sedac_mode": mode}
    first = model.generate(given, **half)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(model.generate(first, **half), whole)
    assert cache.get_seq_length() == whole.shape[1] - 1


def test_heads_that_did_not_follow_are_not_taken_for_followers() -> None:
    model, given = wrap(build_tiny("llama"), {1: "block"}), padded(1)["input_ids"]
    cache = DynamicCache(config=model.base_lm.config)
    text = model.generate(given, **GIVEN, past_key_values=cache, sedac_mode="exact")
    held = cache.get_seq_length()
    assert cache.get_seq_length(4) == held
    model.generate(text, **GIVEN, past_key_values=cache, sedac_mode="plain")
    assert cache.get_seq_length() == held + 14
    assert cache.get_seq_length(4) == held


def test_embeddings_and_chunks_of_transformers_are_read(reads: list[int]) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), long(1)
    embeds = base.get_input_embeddings()(given["input_ids"])
    expected = base.generate(**given, **GIVEN)
    for mode in ("exact", "plain"):
        found = model.generate(inputs_embeds=embeds, **GIVEN, sedac_mode=mode)
        assert torch.equal(found, expected[:, 40:])
        found = model.generate(**given, **GIVEN, prefill_chunk_size=16, sedac_mode=mode)
        assert torch.equal(found, expected)
    assert reads == [40, 16, 16, 8] * 2


def test_what_a_reader_does_not_know_goes_to_the_base(reads: list[int]) -> None:
    base = build_tiny("llama")
    model, given = wrap(base, {-1: "feedback"}), padded(1)
    asked: list[dict[str, Any]] = []
    serves = PromptReader.serves

    def also(self: PromptReader, arguments: dict[str, Any]) -> bool:
        asked.append(arguments)
        return serves(self, {**arguments, "token_type_ids": None})

    PromptReader.serves = also  # type: ignore[method-assign]
    try:
        found = model.generate(**given, **GIVEN, sedac_mode="exact")
    finally:
        PromptReader.serves = serves  # type: ignore[method-assign]
    assert torch.equal(found, base.generate(**given, **GIVEN))
    assert asked
    assert not reads


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each row in every call that writes heads' K/V alone, from now on."""
    counts: list[int] = []
    fill = NativePass.fill

    def counted(self: NativePass, k: int, hidden: torch.Tensor, *rest: Any) -> None:
        counts.append(hidden.shape[1])
        fill(self, k, hidden, *rest)

    monkeypatch.setattr(NativePass, "fill", counted)
    return counts


def test_a_head_that_nobody_asks_is_spared_the_prompt(
    monkeypatch: pytest.MonkeyPatch, fills: list[int]
) -> None:
    model = wrap(build_tiny("llama"), {1: "feedback"})
    said = iter([False] * 5 + [True] * 100)
    monkeypatch.setattr(Governor, "begin", lambda self: Cycle(on=next(said)))
    monkeypatch.setattr(Governor, "alike", lambda self, most: 1)
    model.generate(**long(), **GIVEN, sedac_mode="exact")  # the first call measures, and asks it
    fills.clear()
    said = iter([False] * 100)
    expected = model.generate(**long(), **GIVEN, sedac_mode="exact")
    assert not fills
    said = iter([False] * 5 + [True] * 100)
    assert torch.equal(model.generate(**long(), **GIVEN, sedac_mode="exact"), expected)
    assert sum(fills) == 40


@pytest.mark.parametrize("steps", [False, True], ids=["core", "steps"])
@pytest.mark.parametrize("kinds", [{-1: "feedback"}, {1: "feedback"}, {1: "block"}])
def test_what_heads_draft_does_not_depend_on_when_they_are_given_the_prompt(
    kinds: dict[int, str], steps: bool, monkeypatch: pytest.MonkeyPatch, cycles: list[Any]
) -> None:
    model, found = wrap(build_tiny("llama"), kinds), []
    for most in (0, 1200, 1 << 24):  # at once, in two parts, and all later
        monkeypatch.setattr(prompt_reader, "_MOST_WAITING", most)
        cycles.clear()
        with step_by_step() if steps else nullcontext():
            model.generate(**long(), **GIVEN, sedac_mode="exact")
        found.append(list(cycles))
    assert any(cycle[3][1] for cycle in found[0])  # it drafted
    assert found[0] == found[1] == found[2]


def test_exits_do_not_depend_on_when_heads_are_given_the_prompt(
    monkeypatch: pytest.MonkeyPatch, fills: list[int]
) -> None:
    model, found = settled("feedback"), []
    for most in (0, 1 << 24):
        monkeypatch.setattr(prompt_reader, "_MOST_WAITING", most)
        text = model.generate(**long(), **GIVEN, sedac_mode="certified")
        found.append((text.tolist(), model.exit_stats.to_dict()["exits_by_layer"]))
        model.exit_stats.reset()
    assert fills
    assert sum(found[0][1].values()) > 0
    assert found[0] == found[1]
