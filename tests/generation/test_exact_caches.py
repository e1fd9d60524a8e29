"""Exact mode and what comes before it and after: caches, embeddings, vocabularies, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from sedac_hf.config import CheckpointSpec
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.modeling import SedacForCausalLM
from tests.generation.drafting import EXACT, GREEDY, NEW, knowing, padded
from tests.generation.drafting import _eager as _eager
from tests.generation.drafting import modules as modules
from tests.tiny_models import LAYERS
from tests.wrapping import wrap


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("kinds", [{-1: "feedback", 0: "block"}, {2: "block"}], ids=str)
def test_the_cache_that_comes_back_goes_on(
    tiny: PreTrainedModel, kind: str, kinds: dict[int, str]
) -> None:
    model = wrap(tiny, kinds)
    given = padded(2)
    cache: Any = DynamicCache(config=tiny.config)
    if kind == "static":
        cache = StaticCache(config=tiny.config, max_cache_len=32)
    values = {**GREEDY, "eos_token_id": None, "max_new_tokens": 7}
    first = model.generate(
        **given, **values, past_key_values=cache, return_dict_in_generate=True, **EXACT
    )
    assert first.past_key_values is cache
    lengths = {int(cache.get_seq_length(i)) for i in range(len(cache.layers))}
    assert lengths == {9 + 6}
    mask = torch.cat([given["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
    again = {"attention_mask": mask, "past_key_values": cache}
    found = model.generate(first.sequences, **again, **values, **EXACT)
    expected = tiny.generate(**given, **{**values, "max_new_tokens": 14})
    assert torch.equal(found, expected)


def test_what_the_heads_drafted_from_is_as_if_they_had_read_it(llama: PreTrainedModel) -> None:
    """The cache after exact mode against the same text given as a prompt, heads included."""
    model = wrap(llama, {-1: "feedback", 1: "deep"})
    given = padded(2)
    values = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    output = model.generate(**given, **values, **EXACT)
    cache = output.past_key_values
    text = output.sequences[:, :-1]
    fresh = DynamicCache(config=llama.config)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, NEW - 1), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(
            text,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=fresh,
            use_cache=True,
        )
    assert len(cache.layers) == len(fresh.layers)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        for row in range(2):
            first = row % 4
            torch.testing.assert_close(
                ours.keys[row, :, first:], theirs.keys[row, :, first:], rtol=1e-3, atol=1e-3
            )


def test_embeddings_and_chunks_are_prompts_too(llama: PreTrainedModel) -> None:
    model = knowing(llama)
    given = padded(2)
    expected = llama.generate(**given, **GREEDY)
    found = model.generate(**given, **GREEDY, prefill_chunk_size=4, **EXACT)
    assert torch.equal(found, expected)
    embedded = {
        "inputs_embeds": llama.get_input_embeddings()(given["input_ids"]).detach(),
        "attention_mask": given["attention_mask"],
    }
    expected = llama.generate(**embedded, **GREEDY)
    assert torch.equal(model.generate(**embedded, **GREEDY, **EXACT), expected)


def test_a_small_draft_vocabulary_takes_in_the_prompts_tokens(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = padded(1)
    expected = llama.generate(**given, **GREEDY)
    chosen = torch.tensor([3, 4, 5])
    specs = [CheckpointSpec(LAYERS - 2)]
    model = SedacForCausalLM.from_base(llama, specs, draft_vocabulary=chosen)
    widths = []
    run = ModulePass._draft_logits

    def seen(self: ModulePass, hidden: Tensor) -> Tensor:
        logits = run(self, hidden)
        widths.append(int(logits.shape[-1]))
        return logits

    monkeypatch.setattr(ModulePass, "_draft_logits", seen)
    assert torch.equal(model.generate(**given, **GREEDY, **EXACT), expected)
    assert set(widths) == {len({3, 4, 5, *given["input_ids"].flatten().tolist()})}


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "offloaded_static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_what_exact_mode_cannot_serve_runs_at_full_depth(
    llama: PreTrainedModel, values: dict[str, Any]
) -> None:
    if "offloaded_static" in values.values() and not torch.cuda.is_available():
        values = {"cache_implementation": "static"}
    given = padded(1)
    expected = llama.generate(**given, **GREEDY, **values)
    found = knowing(llama).generate(**given, **GREEDY, **values, **EXACT)
    if not isinstance(found, Tensor):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
