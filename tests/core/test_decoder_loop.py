"""Exits against the independent slow reference, on every architecture, K/V included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import ARCHITECTURES, LAYERS, build_tiny, prompt
from tests.wrapping import NEW, exits_by_hand, generated, mixed, rule, wrap


def assert_equals_reference(
    model: SedacForCausalLM, output: object, length: int, mask: Tensor | None = None
) -> None:
    """Logits, tokens, exit layers and the K/V of every base layer are those of the reference."""
    fed = output.sequences[:, :-1]
    if mask is not None:
        ones = mask.new_ones((len(mask), fed.shape[1] - mask.shape[1]))
        mask = torch.cat([mask, ones], dim=1)
    expected = exits_by_hand(model, fed, length, mask)
    logits = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits, expected.logits[:, length - 1 :], rtol=1e-4, atol=1e-4)
    assert torch.equal(output.exit_layers, expected.layers[:, length - 1 :])
    real = torch.ones_like(fed) if mask is None else mask
    for i in range(LAYERS):
        layer = output.past_key_values.layers[i]
        seen = layer.keys.shape[2]
        keep = real[:, None, -seen:, None].bool()
        for found, whole in ((layer.keys, expected.keys[i]), (layer.values, expected.values[i])):
            torch.testing.assert_close(
                found * keep, whole[:, :, -seen:] * keep, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", ["lens", "block", "feedback"])
def test_forced_exit_equals_the_slow_reference(tiny: PreTrainedModel, kind: str) -> None:
    model = wrap(tiny, {1: kind})
    ids = prompt(2, 5)
    output = generated(model, ids)
    assert (output.exit_layers[:, 1:] == 1).all()
    assert (output.exit_layers[:, 0] == LAYERS).all(), "a prompt runs at full depth"
    assert_equals_reference(model, output, 5)


@pytest.mark.parametrize("kinds", [{0: "lens", 2: "block"}, {0: "feedback", 1: "deep", 2: "lens"}])
def test_mixed_exits_equal_the_slow_reference(tiny: PreTrainedModel, kinds: dict[int, str]) -> None:
    model, output = mixed(tiny, kinds, prompt(3, 5), sample=True)
    assert_equals_reference(model, output, 5)


def test_left_padding_equals_the_slow_reference(tiny: PreTrainedModel) -> None:
    kinds = {0: "feedback", 2: "block"}
    ids = prompt(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    model, output = mixed(tiny, kinds, ids, sample=True, attention_mask=mask)
    assert_equals_reference(model, output, 7, mask)


def test_probability_gate_equals_the_slow_reference(llama: PreTrainedModel) -> None:
    draft = torch.arange(3, 60)
    kinds = {0: "block", 2: "lens"}
    rules = [rule(k, min_probability=1.0) for k in kinds]
    first = wrap(llama, kinds, rules, draft_vocabulary=draft)
    text = generated(first, prompt(3, 5), sample=True).sequences
    probabilities = first(text, exits="simulate", exit_start=5).probabilities
    gates = [float(probabilities[..., 0].nanquantile(0.65)), 0.02]
    rules = [rule(k, min_probability=gate) for k, gate in zip(kinds, gates, strict=True)]
    model = wrap(llama, kinds, rules, draft_vocabulary=draft)
    output = generated(model, prompt(3, 5), sample=True)
    assert len(set(output.exit_layers[:, 1:].flatten().tolist())) > 1
    assert_equals_reference(model, output, 5)
    assert model.exit_stats.tries_by_layer[0] > model.exit_stats.exits_by_layer[0]


def test_rows_do_not_depend_on_their_company(tiny: PreTrainedModel) -> None:
    kinds = {0: "feedback", 2: "block"}
    ids = prompt(4, 6)
    model, together = mixed(tiny, kinds, ids)
    for row in range(len(ids)):
        alone = generated(model, ids[row : row + 1])
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert torch.equal(alone.exit_layers[0], together.exit_layers[row])


@pytest.mark.parametrize("kinds", [{0: "lens", 2: "block"}, {0: "feedback", 2: "deep"}])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_simulation_equals_decoding(name: str, kinds: dict[int, str]) -> None:
    model, output = mixed(build_tiny(name), kinds, prompt(3, 5), temperature=1.7, sample=True)
    simulated = model(output.sequences[:, :-1], exits="simulate", exit_start=5)
    assert torch.equal(simulated.exit_layers[:, 4:], output.exit_layers)
    found = simulated.logits[:, 4:].log_softmax(-1)
    left = (output.exit_layers < LAYERS)[..., None]
    raw = torch.stack(output.logits, dim=1)
    expected = torch.where(left, raw / 1.7, raw).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_exit_start_and_padding_bound_the_simulation(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    ids = prompt(3, 8)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    output = model(ids, attention_mask=mask, exits="simulate", exit_start=torch.tensor([0, 3, 4]))
    left = output.exit_layers < LAYERS
    assert left.tolist() == [
        [True] * 8,
        [False] * 3 + [True] * 5,
        [False] * 4 + [True] + [False] * 3,
    ]
    expected = llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(output.logits[1, :3], expected[1, :3])


def test_every_cache_layer_ends_with_the_same_length(tiny: PreTrainedModel) -> None:
    kinds = {0: "feedback", 2: "deep"}
    cache = mixed(tiny, kinds, prompt(3, 5))[1].past_key_values
    assert len(cache.layers) == LAYERS + 3 + 1
    assert {cache.get_seq_length(i) for i in range(len(cache.layers))} == {5 + NEW - 1}


def test_a_risk_that_is_not_finite_never_exits(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    assert (generated(model, prompt(2, 5)).exit_layers[:, 1:] == 1).all()
    for value in (float("nan"), float("inf")):
        hook = llama.model.layers[1].register_forward_hook(lambda m, a, o, v=value: o + v)
        assert (generated(model, prompt(2, 5)).exit_layers == LAYERS).all()
        hook.remove()


def test_an_exit_of_nan_logits_does_not_pass_the_gate(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"}, [rule(1, min_probability=1e-6)])
    with torch.no_grad():
        model.exit_heads[0].up.bias.fill_(float("nan"))
    output = generated(model, prompt(2, 5))
    assert (output.exit_layers == LAYERS).all()
    assert torch.equal(
        output.sequences[:, 5:],
        llama.generate(prompt(2, 5), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[:, 5:],
    )


def test_the_embedding_can_be_a_checkpoint(llama: PreTrainedModel) -> None:
    model = wrap(llama, {-1: "block"})
    output = generated(model, prompt(2, 5))
    assert (output.exit_layers[:, 1:] == -1).all()
    cache = output.past_key_values
    assert {cache.get_seq_length(i) for i in range(len(cache.layers))} == {5 + NEW - 1}
    simulated = model(output.sequences[:, :-1], exits="simulate", exit_start=5)
    torch.testing.assert_close(
        simulated.logits[:, 4:], torch.stack(output.logits, dim=1), rtol=1e-4, atol=1e-4
    )
