from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.evaluation.arms import base_arm, make_batches
from sedac_hf.evaluation.benchmark import greedy_settings
from sedac_hf.evaluation.rivals import (
    best_early_exit,
    early_exit_arm,
    lookup_arm,
    reason_against,
    unharmed,
)
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, build_tiny

PROMPT = [5, 6, 7, 8, 5, 6, 7]


def wrapped(name):
    """A base without exits."""
    return SedacForCausalLM.from_base(build_tiny(name), self_check=False)


def condition(model):
    """What drafting could change in a base, and what it would then write."""
    base = model.base_lm
    ids = torch.tensor([PROMPT])
    return (
        base.config.to_dict(),
        base.generation_config.to_dict(),
        base(input_ids=ids, use_cache=False).logits.tolist(),
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "falcon"])
def test_the_base_is_unharmed_whether_early_exit_drafting_works_or_raises(name):
    model = wrapped(name)
    (batch,) = make_batches([PROMPT], 1, pad=0)
    before = condition(model)
    arm = early_exit_arm(model, 2, greedy_settings(model, 4))
    reason = reason_against(arm, batch)
    assert condition(model) == before
    if name == "gpt2":
        assert reason is not None
        assert "IndexError" in reason
    if name == "llama":
        assert reason is None


def test_an_error_of_any_kind_puts_layers_and_settings_back():
    base = build_tiny("llama")
    before = base.generation_config.to_dict()

    def fail():
        with unharmed(base):
            base.config.num_hidden_layers = 1
            base.generation_config.num_assistant_tokens = 99
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert base.config.num_hidden_layers == LAYERS
    assert base.generation_config.to_dict() == before


@pytest.mark.parametrize(
    "arm_of", [lookup_arm, lambda *given: early_exit_arm(given[0], 2, given[1])]
)
def test_rivals_write_the_bases_tokens_and_as_many(arm_of):
    model = wrapped("llama")
    (batch,) = make_batches([PROMPT], 1, pad=0)
    settings = greedy_settings(model, 9)
    ours, rival = base_arm(model, settings), arm_of(model, settings)
    ours(batch)
    rival(batch)
    assert rival.new_tokens(batch) == 9
    assert torch.equal(rival.texts[0], ours.texts[0])


def test_the_best_layer_is_the_one_that_took_least_time(monkeypatch):
    model = wrapped("llama")
    batches = make_batches([PROMPT, PROMPT[:4]], 1, pad=0)
    pace = {"1": 3.0, "2": 0.5}

    def turns(_, arms, inputs, **options):
        assert set(arms) == set(pace)
        for arm in arms.values():
            for batch in inputs:
                arm(batch)
        return {name: np.full((1, len(inputs)), pace[name]) for name in arms}

    monkeypatch.setattr("sedac_hf.evaluation.rivals.take_turns", turns)
    found = best_early_exit(model, batches, 4)
    assert found.layer == 2
    assert found.seconds_per_token == {1: 2 * 3.0 / 8, 2: 2 * 0.5 / 8}
    assert found.reason is None


def test_where_no_layer_works_the_reason_is_kept():
    found = best_early_exit(wrapped("gpt2"), make_batches([PROMPT], 1, pad=0), 4)
    assert found.layer is None
    assert found.seconds_per_token == {}
    assert "IndexError" in str(found.reason)
