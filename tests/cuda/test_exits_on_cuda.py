"""On a CUDA device tokens leave where they leave on the CPU, and score alike."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf import SedacForCausalLM, evaluate
from sedac_hf.core.cascade_controller import CascadeConfig
from tests.core.test_settle import half_open
from tests.cuda.device import (
    DEVICE,
    GREEDY,
    LONG,
    ROWS,
    micro_prompts,
    moved,
    needs_device,
    on,
)
from tests.generation.drafting import padded
from tests.micro_exits import LAYER, micro_documents
from tests.micro_model import NUM_LAYERS, MicroModel
from tests.tiny_models import LAYERS, prompt
from tests.wrapping import rule, wrap

pytestmark = needs_device
KINDS = {0: "feedback", 2: "block"}


@pytest.mark.parametrize("kv_mode", ["settle", "propagate"])
def test_forced_exits_are_those_of_the_cpu(base: PreTrainedModel, kv_mode: str) -> None:
    given = padded(4)
    here = wrap(copy.deepcopy(base).to("cpu"), {1: "feedback"}, kv_mode=kv_mode)
    there = wrap(base, {1: "feedback"}, kv_mode=kv_mode)
    first, second = (
        model.generate(**on(given, model.device), **GREEDY, eos_token_id=None,
                       sedac_mode="certified", return_dict_in_generate=True)
        for model in (here, there)
    )  # fmt: skip
    assert second.sequences.device.type == DEVICE.type
    assert torch.equal(second.sequences.cpu(), first.sequences)
    assert (first.exit_layers[:, 1:] == 1).all()
    assert torch.equal(second.exit_layers.cpu(), first.exit_layers)
    assert there.exit_stats.exits_by_layer == here.exit_stats.exits_by_layer


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kv_mode", ["settle", "propagate"])
def test_earned_exits_are_those_of_the_cpu(
    micro_model: MicroModel, exiting: SedacForCausalLM, kv_mode: str, rows: int
) -> None:
    given = micro_prompts(micro_model, rows)
    here = copy.deepcopy(exiting)
    here.config.kv_mode = kv_mode
    there = moved(exiting, kv_mode=kv_mode)
    first, second = (
        model.generate(**on(given, model.device), **LONG, sedac_mode="certified",
                       return_dict_in_generate=True)
        for model in (here, there)
    )  # fmt: skip
    assert torch.equal(second.sequences.cpu(), first.sequences)
    assert torch.equal(second.exit_layers.cpu(), first.exit_layers)
    assert {LAYER, NUM_LAYERS} <= set(first.exit_layers[:, 1:].flatten().tolist())
    assert there.exit_stats.tries_by_layer == here.exit_stats.tries_by_layer


@pytest.mark.parametrize("kv_mode", ["settle", "propagate"])
def test_simulated_exits_are_those_of_the_cpu(base: PreTrainedModel, kv_mode: str) -> None:
    ids = prompt(4, 12)
    closed = [rule(layer, 0.0) for layer in KINDS]
    here = wrap(copy.deepcopy(base).to("cpu"), KINDS, closed, kv_mode=kv_mode)
    here.set_cascade(CascadeConfig(half_open(here, tuple(KINDS), ids)))
    there = wrap(base, KINDS, here.cascade.layers, kv_mode=kv_mode)
    with torch.no_grad():
        expected = here(ids, exits="simulate", exit_start=3)
        found = there(ids.to(DEVICE), exits="simulate", exit_start=3)
    assert found.logits.device.type == DEVICE.type
    assert 0.1 < float((expected.exit_layers[:, 3:] < LAYERS).float().mean()) < 0.95
    assert torch.equal(found.exit_layers.cpu(), expected.exit_layers)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        found.risks.cpu(), expected.risks, rtol=1e-3, atol=1e-3, equal_nan=True
    )


def test_evaluation_is_that_of_the_cpu(micro_model: MicroModel, exiting: SedacForCausalLM) -> None:
    documents = micro_documents(micro_model.language, 12, seed=78)
    here, there = (
        evaluate(model, documents, mode="certified", speed=False)
        for model in (copy.deepcopy(exiting), moved(exiting))
    )
    assert here["sedac_ppl"] > here["base_ppl"]
    for name in ("base_ppl", "sedac_ppl", "mean_depth"):
        assert there[name] == pytest.approx(here[name], rel=1e-3), name
    assert there["tokens"] == here["tokens"]
    assert there["exit_share"] == pytest.approx(here["exit_share"], abs=2e-3)
    assert here["exit_share"] > 0.05


def test_speed_is_measured_on_the_device(
    micro_model: MicroModel, exiting: SedacForCausalLM
) -> None:
    documents = micro_documents(micro_model.language, 2, seed=79)
    found = evaluate(moved(exiting), documents, mode="exact", max_new_tokens=4, rounds=2)
    assert found["speed_vs_generate"] > 0
    assert found["speed_vs_plain"] > 0
    assert found["sedac_ppl"] == found["base_ppl"]
