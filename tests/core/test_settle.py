"""Exits that are settled: final for the token that left, invisible to every later K/V."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sedac_hf.core.cascade_controller import LayerConfig
from tests.tiny_models import ARCHITECTURES, VOCABULARY, build_tiny
from tests.wrapping import rule, wrap

KINDS = ("lens", "block", "feedback")


def half_open(model, layers, ids):
    """Rules under which about half of the positions leave."""
    risks = model(input_ids=ids, use_cache=False, exits="simulate").risks.flatten(0, 1)
    levels = risks.nanquantile(0.45, 0)  # between two risks, so that rounding decides nothing
    return [
        LayerConfig(layer, 2 * float(level), decay=0.0, exit_confidence=0.5)
        for layer, level in zip(layers, levels, strict=True)
    ]


def settled(kind, layers=(0, 2), architecture="llama"):
    """A wrapped tiny model with K/V by `settle` from whose checkpoints about half may leave."""
    base = build_tiny(architecture)
    model = wrap(base, dict.fromkeys(layers, kind), [rule(layer, 0.0) for layer in layers])
    torch.manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (4, 12))
    model.set_cascade(type(model.cascade)(half_open(model, layers, ids)))
    model.config.kv_mode = "settle"
    return model, ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_and_values_are_those_of_the_base(architecture):
    model = wrap(build_tiny(architecture), {0: "feedback"}, kv_mode="settle")
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, ids.flip(1)], dim=1)
    mine, own = (DynamicCache(config=model.base.config) for _ in range(2))
    with torch.no_grad():
        for lm, cache in ((model, mine), (model.base, own)):
            lm(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
            for at in range(6, ids.shape[1]):
                lm(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
    assert model.exit_stats.exits_by_layer == {0: 12}
    for found, expected in zip(mine.layers, own.layers, strict=False):
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("kind", KINDS)
def test_simulation_says_what_decoding_does(kind):
    model, ids = settled(kind)
    found = model(input_ids=ids, use_cache=False, exits="simulate", exit_start=3)
    assert 0.1 < float((found.exit_layers[:, 3:] < 4).float().mean()) < 0.9
    for row in range(len(ids)):
        cache = DynamicCache(config=model.base.config)
        with torch.no_grad():
            model(input_ids=ids[row : row + 1, :3], past_key_values=cache, use_cache=True)
            for at in range(3, ids.shape[1]):
                model.exit_stats.reset()
                step = ids[row : row + 1, at : at + 1]
                logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
                torch.testing.assert_close(logits[:, 0], found.logits[row : row + 1, at])
                layer = int(found.exit_layers[row, at])
                assert model.exit_stats.mean_depth == min(layer + 1, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_company(kind):
    model, ids = settled(kind)
    together = model(input_ids=ids, use_cache=False, exits="simulate", exit_start=3)
    for row in range(len(ids)):
        alone = model(input_ids=ids[row : row + 1], use_cache=False, exits="simulate", exit_start=3)
        torch.testing.assert_close(alone.logits[0], together.logits[row])
        assert torch.equal(alone.exit_layers[0], together.exit_layers[row])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_at_full_depth_are_scored_as_by_the_base(kind):
    model, ids = settled(kind)
    found = model(input_ids=ids, use_cache=False, exits="simulate", exit_start=3)
    base = model.base(input_ids=ids, use_cache=False).logits
    deep = found.exit_layers == 4
    assert deep[:, 3:].any()
    torch.testing.assert_close(found.logits[deep], base[deep])
    assert not torch.allclose(found.logits[~deep], base[~deep])
