"""Soft exits over whole sequences, against the base with channels put to zero by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sedac_hf.calibration import ChannelOrder, channel_order
from sedac_hf.core.narrow_tail import KeptChannels
from sedac_hf.errors import ConfigError, UnsupportedModelError
from sedac_hf.modeling import SedacForCausalLM
from tests.slow_reference import SlowReference
from tests.soft import (
    channels_zeroed,
    documents,
    eighths_by_hand,
    importances,
    soft_model,
)
from tests.tiny_models import LAYERS, build_tiny, prompt
from tests.wrapping import CascadeByHand, rule, wrap

BASES = ("llama", "gemma2", "gpt2", "phi3", "gpt_neox")
STRATEGIES = ("soft", "adaptive-soft")
START = 4  # positions before it are a prompt


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_tiny(request.param)


def walked(model: SedacForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and kept eighths `[layers, rows, seq]` of the rule, checkpoint by checkpoint."""
    assert model.cascade is not None
    rules, (rows, seq) = model.cascade, ids.shape
    asked = (torch.arange(seq) >= START).repeat(rows, 1)
    decide = CascadeByHand(model, asked, SlowReference(model.base))
    order, kept = orders(model.base), torch.full((LAYERS, rows, seq), 8)
    # States at a checkpoint depend on earlier decisions alone: one forward for each.
    for k, layer in enumerate(rules.layer_indices):
        with channels_zeroed(model.base, kept, order):
            states = model.base(ids, output_hidden_states=True).hidden_states[layer + 1]
        decide(k, states, states)
        confidence = decide._confidence / decide._most
        sure = asked & (confidence >= rules.layers[k].exit_confidence)
        for row, at in sure.nonzero().tolist():
            for i in range(layer + 1, LAYERS):
                kept[i, row, at] = eighths_by_hand(
                    rules.strategy, rules.steepness, float(confidence[row, at]),
                    i - layer - 1, LAYERS - layer - 1,
                )  # fmt: skip
        asked &= ~sure
    with channels_zeroed(model.base, kept, order):
        return model.base(ids).logits, kept


def orders(base: PreTrainedModel) -> list[Tensor]:
    return [found.argsort(descending=True) for found in importances(base, documents())]


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_soft_exits_are_the_base_without_the_channels_that_are_not_kept(
    base: PreTrainedModel, strategy: str
) -> None:
    model = soft_model(base, strategy)
    ids = prompt(3, 14)
    found = model(ids, exits="simulate", exit_start=START)
    logits, kept = walked(model, ids)
    np.testing.assert_allclose(found.kept_shares, kept.double().mean(0) / 8, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-3, atol=1e-3)
    assert (found.soft_exits[:, :START] == -1).all()
    assert 0.2 < (found.soft_exits[:, START:] >= 0).float().mean() < 1
    assert len(found.kept_shares.unique()) > 2
    assert (found.exit_layers == LAYERS).all()
    # They matter: what they leave out changes the logits.
    whole = model.base(ids).logits
    assert (found.logits - whole)[:, START:].abs().max() > 1e-2
    torch.testing.assert_close(found.logits[:, :START], whole[:, :START])


@torch.no_grad()
def test_eight_eighths_are_the_bits_of_plain(base: PreTrainedModel) -> None:
    model = soft_model(base, share=1.0)
    ids = prompt(2, 10)
    # A confidence below one half keeps seven eighths and more at this steepness: all of them.
    layers = [replace(layer, exit_confidence=0.0) for layer in model.cascade.layers]
    gentle = replace(model.cascade, layers=layers, steepness=500.0)
    closed = [replace(layer, threshold=1e-6) for layer in gentle.layers]
    model.set_cascade(replace(gentle, layers=closed))
    found = model(ids, exits="simulate")
    assert (found.soft_exits == 0).all()
    assert (found.kept_shares == 1).all()
    assert torch.equal(found.logits, model.base(ids).logits)


@torch.no_grad()
def test_a_row_is_the_same_in_company(base: PreTrainedModel) -> None:
    model = soft_model(base)
    ids = prompt(4, 12)
    together = model(ids, exits="simulate", exit_start=START)
    for row in range(4):
        alone = model(ids[row : row + 1], exits="simulate", exit_start=START)
        assert torch.equal(alone.kept_shares[0], together.kept_shares[row])
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_risk_that_is_no_number_never_softens(llama: PreTrainedModel) -> None:
    model = soft_model(llama, share=1.0)
    ids = prompt(2, 8)
    llama.model.embed_tokens.weight[1] = float("nan")
    ids[1, 3] = 1
    found = model(ids, exits="simulate")
    assert (found.soft_exits[0] >= 0).any()
    assert found.risks[1, 3:].isnan().all()
    assert (found.soft_exits[1, 3:] == -1).all()
    assert (found.kept_shares[1, 3:] == 1).all()
    model.generate(ids[1:], max_new_tokens=3, do_sample=False)
    assert model.exit_stats.soft_exit_share == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_fewer_channels_are_really_fewer_products(name: str) -> None:
    base = build_tiny(name)
    model = soft_model(base)
    model.assembly.prepare_narrow()
    passes: Any = model.assembly.parts.passes
    hidden, calls = model.shell.prologue(input_ids=prompt(1, 1), use_cache=False)

    def flops(eighths: int) -> int:
        kept = KeptChannels(LAYERS, (1, 1))
        kept.eighths[:] = eighths
        with FlopCounterMode(display=False) as counter:
            passes.run(hidden, calls, 0, LAYERS, kept=kept)
        return counter.get_total_flops()

    projections = 3 if name == "llama" else 2
    width, inner = base.config.hidden_size, 48
    for eighths in (1, 4, 7):
        spared = 2 * LAYERS * projections * width * (inner - inner * eighths // 8)
        assert flops(8) - flops(eighths) == spared


def test_weights_that_change_are_seen(llama: PreTrainedModel) -> None:
    model = soft_model(llama)
    ids = prompt(1, 12)
    before = model(ids, exits="simulate")
    for layer in llama.model.layers:
        layer.mlp.down_proj.weight.data.mul_(0.5)
    found = model(ids, exits="simulate")
    again = soft_model(llama)
    again.set_channel_order(model.channel_order)
    again.set_cascade(model.cascade)
    torch.testing.assert_close(found.logits, again(ids, exits="simulate").logits)
    assert not torch.allclose(found.logits, before.logits)


def test_soft_exits_without_an_order_say_where_it_comes_from(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"}, [rule(1)], strategy="soft")
    for use in (
        lambda: model(prompt(1, 6), exits="simulate"),
        lambda: model.generate(prompt(1, 4), max_new_tokens=2),
    ):
        with pytest.raises(ConfigError, match="set_channel_order"):
            use()
    assert model.generate(prompt(1, 4), max_new_tokens=2, sedac_mode="plain").shape == (1, 6)


def test_an_order_is_refused_where_nothing_can_be_narrowed() -> None:
    base = build_tiny("opt")
    model = wrap(base, {1: "lens"})
    order = ChannelOrder(tuple(torch.arange(48) for _ in range(LAYERS)))
    with pytest.raises(UnsupportedModelError, match="soft exits cannot narrow"):
        model.set_channel_order(order)
    model.set_channel_order(order, check=False)
    assert model.generate(prompt(1, 4), max_new_tokens=2).shape == (1, 6)
    llama = build_tiny("llama")
    other = channel_order(llama, documents())
    wrap(llama, {1: "lens"}).set_channel_order(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_gpu_says_what_the_cpu_says(base: PreTrainedModel) -> None:
    model = soft_model(base)
    ids = prompt(3, 14)
    expected = model(ids, exits="simulate", exit_start=START)
    found = model.to("cuda")(ids.cuda(), exits="simulate", exit_start=START)
    assert torch.equal(found.kept_shares, expected.kept_shares)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
