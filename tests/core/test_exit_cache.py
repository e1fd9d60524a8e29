"""Extra cache layers of exit heads: where they come from, and when they are out of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sedac_hf.core.exit_cache import ExitCache, predecessor_visible, previous_states
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, WIDTH, build_tiny, prompt
from tests.wrapping import wrap


def layout_of(model: SedacForCausalLM) -> ExitCache:
    return model.assembly.parts.layout


def test_layers_are_of_the_templates_kind() -> None:
    gemma = build_tiny("gemma2")  # sliding and full layers in turn
    kinds = {0: "block", 1: "deep", 2: "feedback"}
    layout = layout_of(wrap(gemma, kinds))
    assert layout.first_layer == [LAYERS, LAYERS + 1, LAYERS + 3]
    cache = DynamicCache(config=gemma.config)
    assert layout.attach(cache)
    extra = cache.layers[LAYERS:]
    assert [type(layer) for layer in extra] == [type(cache.layers[-5])] * 4 + [DynamicLayer]
    assert len({id(layer) for layer in cache.layers}) == LAYERS + 5


def test_a_cache_without_a_configuration_is_filled_up(llama: Any) -> None:
    layout = layout_of(wrap(llama, {1: "block"}))
    cache = DynamicCache()
    assert layout.attach(cache)
    assert len(cache.layers) == LAYERS + 1


def test_attaching_twice_changes_nothing(llama: Any) -> None:
    layout = layout_of(wrap(llama, {1: "block"}))
    cache = StaticCache(config=llama.config, max_cache_len=9)
    assert layout.attach(cache)
    layers = list(cache.layers)
    assert layout.attach(cache)
    assert cache.layers == layers
    assert isinstance(cache.layers[-1], StaticLayer)
    assert cache.layers[-1].max_cache_len == 9


def test_a_filled_cache_is_refused_and_another_layout_replaced(llama: Any) -> None:
    layout = layout_of(wrap(llama, {1: "block"}))
    cache = DynamicCache(config=llama.config)
    llama(prompt(1, 3), past_key_values=cache)
    assert not layout.attach(cache)
    assert len(cache.layers) == LAYERS
    fresh = DynamicCache(config=llama.config)
    assert layout_of(wrap(llama, {0: "feedback", 1: "block"})).attach(fresh)
    assert layout.attach(fresh)
    assert len(fresh.layers) == LAYERS + 1


def test_a_cache_that_went_on_without_the_heads_is_out_of_step(llama: Any) -> None:
    model = wrap(llama, {1: "block"})
    layout = layout_of(model)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        model(prompt(1, 4), past_key_values=cache, use_cache=True)
        assert layout.attach(cache)
        llama(prompt(1, 1), past_key_values=cache)
    assert not layout.attach(cache)


def test_lens_heads_need_no_layers(llama: Any) -> None:
    layout = layout_of(wrap(llama, {1: "lens"}))
    cache = DynamicCache(config=llama.config)
    llama(prompt(1, 3), past_key_values=cache)
    assert not layout.is_needed
    assert layout.attach(cache)
    assert len(cache.layers) == LAYERS


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_states_of_positions_are_kept_and_follow_the_batch(kind: str) -> None:
    base = build_tiny("mistral" if kind == "sliding" else "llama")
    layout = layout_of(wrap(base, {1: "feedback"}))
    cache: Any = DynamicCache(config=base.config)
    if kind != "dynamic":
        cache = StaticCache(config=base.config, max_cache_len=12)
    assert layout.attach(cache)
    like = torch.zeros(2, 1, WIDTH)
    assert not layout.last_state(cache, like).any()
    states = torch.randn(2, 9, WIDTH)
    layout.push_states(cache, states[:, :8])
    assert torch.equal(layout.last_state(cache, like), states[:, 7:8])
    layout.push_states(cache, states[:, 8:])
    assert torch.equal(layout.last_state(cache, like), states[:, 8:])
    cache.layers[LAYERS + 1].reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layout.last_state(cache, like), states[[1, 0], 8:])
    if kind == "dynamic":
        cache.layers[LAYERS + 1].crop(-3)
        assert torch.equal(layout.last_state(cache, like), states[[1, 0], 5:6])


def test_sliding_templates_slide() -> None:
    base = build_tiny("mistral")
    layout = layout_of(wrap(base, {1: "block"}))
    cache = DynamicCache(config=base.config)
    assert layout.attach(cache)
    assert isinstance(cache.layers[LAYERS], DynamicSlidingWindowLayer)


def test_each_position_gets_its_predecessors_state() -> None:
    states = torch.arange(6.0).view(1, 6, 1)
    before = torch.tensor([[[9.0]]])
    assert previous_states(states, before, None).flatten().tolist() == [9, 0, 1, 2, 3, 4]
    visible = torch.tensor([[False, False, True, True, True, True]])
    assert previous_states(states, before, visible).flatten().tolist() == [0, 0, 1, 2, 3, 4]


def four_dimensional(mask: Tensor, past: int, seq: int, boolean: bool) -> Tensor:
    rows = torch.arange(past, past + seq)[:, None]
    seen = (torch.arange(mask.shape[1])[None] <= rows)[None] & mask[:, None].bool()
    seen = seen[:, None]
    return seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, -1e9)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("form", ["2d", "bool", "float", "dict"])
def test_padding_is_seen_in_every_form_of_mask(form: str, past: int) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    seq = 6 - past
    given: Any = mask
    if form in ("bool", "float"):
        given = four_dimensional(mask, past, seq, form == "bool")
    elif form == "dict":
        given = {"none": None, "full_attention": four_dimensional(mask, past, seq, True)}
    found = predecessor_visible(given, past, seq)
    expected = torch.nn.functional.pad(mask, (1, 0))[:, past : past + seq].bool()
    real = mask[:, past:].bool()  # what a padded position sees does not matter
    assert torch.equal(found[real], expected[real])


def test_no_mask_hides_nothing() -> None:
    assert predecessor_visible(None, 0, 4) is None
    assert predecessor_visible({"full_attention": None}, 0, 4) is None
