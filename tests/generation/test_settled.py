"""Certified generation with settled exits: tails wait, and nothing but time depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.generation import settle_loop
from tests.tiny_models import ARCHITECTURES, VOCABULARY, build_tiny
from tests.wrapping import rule, wrap

KINDS = ("lens", "block", "feedback")
GIVEN = {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


def prompts(rows=3, length=6, seed=2):
    return torch.randint(
        3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def settled(kind="feedback", layers=(-1, 1), architecture="llama", share=0.45, **values):
    """A wrapped tiny model whose checkpoints let about `share` of the positions leave."""
    model = wrap(
        build_tiny(architecture), dict.fromkeys(layers, kind), [rule(i, 0.0) for i in layers],
        kv_mode="settle", **values,
    )  # fmt: skip
    ids = prompts(6, 14, seed=9)
    risks = model(input_ids=ids, use_cache=False, exits="simulate").risks.flatten(0, 1)
    levels = risks.nanquantile(share, 0)
    rules = [
        LayerConfig(layer, 2 * float(level), decay=0.0, exit_confidence=0.5)
        for layer, level in zip(layers, levels, strict=True)
    ]
    model.set_cascade(CascadeConfig(rules))
    return model


def at_once(model, ids, **more):
    """The same rule with every tail run in its own step, by the decoder loop."""
    found = []
    for row in range(len(ids)):
        cache = DynamicCache(config=model.base.config)
        step, tokens, layers = ids[row : row + 1], [], []
        for _ in range(GIVEN["max_new_tokens"]):
            model.exit_stats.reset()
            with torch.no_grad():
                logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
            layers.append(model.exit_stats.mean_depth)
            step = logits[:, -1:].argmax(-1)
            tokens.append(int(step))
        found.append((tokens, layers[1:]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_changes_no_token_and_no_exit(kind):
    model, ids = settled(kind), prompts()
    expected = at_once(model, ids)
    model.exit_stats.reset()
    out = model.generate(ids, return_dict_in_generate=True, sedac_mode="certified", **GIVEN)
    left = out.exit_layers[:, 1:]
    assert 0.1 < float((left < 4).float().mean()) < 0.95
    for row, (tokens, depths) in enumerate(expected):
        assert out.sequences[row, 6:].tolist() == tokens
        assert torch.clamp(left[row] + 1, max=4).tolist() == depths


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_settles(architecture):
    model, ids = settled("feedback", architecture=architecture), prompts()
    expected = [tokens for tokens, _ in at_once(model, ids)]
    out = model.generate(ids, sedac_mode="certified", **GIVEN)
    assert out[:, 6:].tolist() == expected


def test_rows_of_a_batch_are_as_alone_with_padding_on_the_left():
    model, ids = settled(), prompts(3, 6)
    mask = torch.ones_like(ids)
    mask[1, :2], ids[1, :2] = 0, 0
    together = model.generate(ids, attention_mask=mask, sedac_mode="certified", **GIVEN)
    for row, start in enumerate((0, 2, 0)):
        alone = model.generate(ids[row : row + 1, start:], sedac_mode="certified", **GIVEN)
        assert alone[0, 6 - start :].tolist() == together[row, 6:].tolist()


@pytest.mark.parametrize("most", [1, 3, 8])
def test_tails_are_shared_by_up_to_max_pending_tokens(most, monkeypatch):
    model, ids = settled(share=1.0, layers=(-1,), max_pending=most), prompts(1)
    model.set_cascade(CascadeConfig([replace(model.cascade.layers[0], threshold=1e9)]))
    loops = []

    class Spy(settle_loop.SettleLoop):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loops.append(self)

    monkeypatch.setattr("sedac_hf.generation.settled.SettleLoop", Spy)
    model.generate(ids, sedac_mode="certified", **GIVEN)
    # The first new token comes from the prompt; all the others leave.
    assert loops[0].tails == 1 + (GIVEN["max_new_tokens"] - 1) // (most + 1)


def test_keys_and_values_that_are_handed_back_are_those_of_the_base():
    model, ids = settled(), prompts(2)
    cache = DynamicCache(config=model.base.config)
    out = model.generate(
        ids, past_key_values=cache, return_dict_in_generate=True, sedac_mode="certified", **GIVEN
    )
    own = DynamicCache(config=model.base.config)
    with torch.no_grad():
        model.base(out.sequences[:, :-1], past_key_values=own)
    for found, expected in zip(out.past_key_values.layers, own.layers, strict=False):
        torch.testing.assert_close(found.keys, expected.keys)
        torch.testing.assert_close(found.values, expected.values)


def test_a_cache_that_was_handed_back_can_be_gone_on_with():
    model, ids = settled(), prompts(1)
    whole = model.generate(ids, sedac_mode="certified", **GIVEN)
    half = {**GIVEN, "max_new_tokens": 7}
    cache = DynamicCache(config=model.base.config)
    first = model.generate(
        ids, past_key_values=cache, return_dict_in_generate=True, sedac_mode="certified", **half
    )
    second = model.generate(first.sequences, past_key_values=cache, sedac_mode="certified", **half)
    assert second[:, : 6 + 7].tolist() == whole[:, : 6 + 7].tolist()
    # The step between the calls is a prompt's own, in which nothing leaves.
    assert second.shape == whole.shape


def test_sampling_draws_what_waiting_for_nothing_draws():
    model, ids = settled(), prompts(2)
    found = []
    for most in (1, 8):
        model.config.max_pending = most
        torch.manual_seed(4)
        found.append(
            model.generate(ids, sedac_mode="certified", **{**GIVEN, "do_sample": True}).tolist()
        )
    assert found[0] == found[1]
