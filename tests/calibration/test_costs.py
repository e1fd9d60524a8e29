from __future__ import annotations

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig, MixtralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sedac_hf.calibration.costs import CheckpointCost, CostModel
from sedac_hf.config import CheckpointSpec
from sedac_hf.errors import CalibrationError
from tests.calibration.synthetic import cost_model


def llama(**changes):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**(settings | changes)))


LAYER = 32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32
KEY_VALUE = 2 * 16 * 32
HEAD = 100 * 32
TOTAL = 4 * LAYER + HEAD


def test_shares_are_those_of_the_weights_that_a_token_reads():
    spec = CheckpointSpec(layer_idx=1)
    costs = CostModel.from_base(llama(), [spec], probe_rank=8, draft_vocabulary=25)
    at = costs.checkpoints[0]
    assert costs.depth == 4
    assert costs.head == pytest.approx(HEAD / TOTAL)
    assert at.saved == pytest.approx(2 * (LAYER - KEY_VALUE) / TOTAL)
    assert at.attempt == pytest.approx(LAYER / TOTAL)
    assert at.fill == pytest.approx(KEY_VALUE / TOTAL)
    assert at.gate == pytest.approx(HEAD / 4 / TOTAL)
    assert at.probe == pytest.approx(8 * 32 / TOTAL)


def test_a_tied_head_is_read_all_the_same():
    tied = CostModel.from_base(
        llama(tie_word_embeddings=True), [CheckpointSpec(layer_idx=1)], probe_rank=8
    )
    assert tied.head == pytest.approx(HEAD / TOTAL)
    assert tied.checkpoints[0].gate == pytest.approx(HEAD / TOTAL)


def test_feedback_and_second_layers_cost_more_and_a_lens_less():
    specs = {
        "block": CheckpointSpec(layer_idx=1),
        "feedback": CheckpointSpec(layer_idx=1, feedback=True),
        "two": CheckpointSpec(layer_idx=1, num_layers=2),
        "lens": CheckpointSpec(layer_idx=1, head="lens", lens_rank=4),
    }
    base = llama()
    found = {
        name: CostModel.from_base(base, [spec], probe_rank=8).checkpoints[0]
        for name, spec in specs.items()
    }
    assert found["feedback"].attempt - found["block"].attempt == pytest.approx(2 * 32 * 32 / TOTAL)
    assert found["two"].attempt == pytest.approx(2 * found["block"].attempt)
    assert found["lens"].attempt == pytest.approx(2 * 32 * 4 / TOTAL)
    assert found["lens"].fill == 0.0


def test_only_the_chosen_experts_count():
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "num_local_experts": 4,
    }
    one, four = (
        CostModel.from_base(
            AutoModelForCausalLM.from_config(MixtralConfig(**settings, num_experts_per_tok=n)),
            [CheckpointSpec(layer_idx=0)],
            probe_rank=8,
        )
        for n in (1, 4)
    )
    attention = 2 * 32 * 32 + KEY_VALUE + 2 * 32 + 4 * 32
    expert = 3 * 32 * 64
    assert one.head == pytest.approx(HEAD / (HEAD + 2 * (attention + expert)))
    assert four.head == pytest.approx(HEAD / (HEAD + 2 * (attention + 4 * expert)))


def test_a_fused_projection_runs_whole():
    base = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100)
    )
    at = CostModel.from_base(base, [CheckpointSpec(layer_idx=0)], probe_rank=8).checkpoints[0]
    layer = sum(p.numel() for p in base.transformer.h[0].parameters())
    fused = 32 * 96 + 96
    assert at.saved / at.attempt == pytest.approx(2 * (layer - fused) / layer)


def test_expected_cost_follows_every_token():
    """Against a token-by-token account of what a decode step runs."""
    costs, rng = cost_model(), np.random.default_rng(0)
    tokens, count = 400, len(costs.checkpoints)
    exits, tries, total = np.zeros((1, count)), np.zeros((1, count)), 0.0
    for _ in range(tokens):
        left = False
        spent = 1.0
        for k, at in enumerate(costs.checkpoints):
            if left:
                spent += at.fill
                continue
            spent += at.probe
            if rng.random() < 0.5:
                tries[0, k] += 1
                spent += at.attempt + at.gate
                if rng.random() < 0.4:
                    exits[0, k] += 1
                    spent -= at.saved
                    left = True
            else:
                spent += at.fill
        total += spent
    expected = costs.expected(exits, tries, np.ones((1, count), bool), tokens)
    assert expected[0] == pytest.approx(total / tokens)
    ungated = costs.expected(exits, tries, np.zeros((1, count), bool), tokens)
    assert expected[0] - ungated[0] == pytest.approx(0.03 * tries.sum() / tokens)


def test_no_decode_step_costs_a_plain_pass():
    assert cost_model().expected(np.zeros((3, 2)), np.zeros((3, 2)), False, 0).tolist() == [1.0] * 3


def test_counts_of_other_checkpoints_are_refused():
    with pytest.raises(CalibrationError, match=r"\[policies, 2\]"):
        cost_model().expected(np.zeros((3, 1)), np.zeros((3, 1)), False, 10)


def test_measured_seconds_become_fractions():
    seconds = CheckpointCost(3, probe=0.001, fill=0.002, attempt=0.03, gate=0.01, saved=0.1)
    costs = CostModel.from_seconds([seconds], head=0.04, full_pass=0.2, depth=10)
    assert costs.source == "measured"
    assert costs.head == pytest.approx(0.2)
    assert costs.checkpoints[0].saved == pytest.approx(0.5)
    with pytest.raises(CalibrationError, match="full_pass"):
        CostModel.from_seconds([seconds], head=0.04, full_pass=0.0, depth=10)


def test_round_trip():
    assert CostModel.from_dict(cost_model().to_dict()) == cost_model()


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_a_cost_out_of_range_is_refused(bad):
    with pytest.raises(CalibrationError, match="probe"):
        CheckpointCost(3, probe=bad, fill=0.0, attempt=0.0, gate=0.0, saved=0.0)
