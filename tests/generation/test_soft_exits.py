"""Soft exits inside `generate`: what is written, counted, stored and reported."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf.calibration import channel_order
from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.certify import certify
from sedac_hf.calibration.policy_search import Policy
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import score_documents
from sedac_hf.metrics import SEDACMetricsCollector
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import load_base, save_base
from tests.micro_exits import micro_documents, micro_exits
from tests.micro_model import MicroModel
from tests.soft import soft_model
from tests.tiny_models import LAYERS, build_tiny, prompt
from tests.wrapping import NEW, generated

STRATEGIES = ("soft", "adaptive-soft")
BASES = ("llama", "gemma2", "gpt2", "phi3", "falcon")
PROMPT = 5


@pytest.fixture(params=["native", "modules"])
def runs_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of running the layers."""
    monkeypatch.setitem(
        os.environ, "SEDAC_PASS", "auto" if request.param == "native" else "modules"
    )
    return str(request.param)


def assert_simulated(model: SedacForCausalLM, output: Any, length: int) -> Any:
    """The text that was generated is the one that whole-sequence scoring scores."""
    ids = output.sequences
    found = model(ids, exits="simulate", exit_start=length)
    at = slice(length - 1, ids.shape[1] - 1)
    torch.testing.assert_close(
        torch.stack(output.logits, dim=1), found.logits[:, at].float(), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(found.logits[:, at].argmax(-1), ids[:, length:])
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BASES)
def test_generation_and_simulation_agree_token_for_token(
    name: str, strategy: str, runs_on: str
) -> None:
    model = soft_model(build_tiny(name), strategy)
    ids = prompt(3, PROMPT)
    output = generated(model, ids)
    found = assert_simulated(model, output, PROMPT)
    stats = model.exit_stats
    counted = found.soft_exits[:, PROMPT : PROMPT + NEW - 1]
    assert stats.tokens == 3 * NEW
    assert sum(stats.soft_exits_by_layer.values()) == int((counted >= 0).sum()) > 0
    for k, layer in enumerate((0, 2)):
        assert stats.soft_exits_by_layer[layer] == int((counted == k).sum())
    narrowed = float((1 - found.kept_shares[:, PROMPT : PROMPT + NEW - 1]).sum())
    assert stats.mean_kept_share == pytest.approx(1 - narrowed / stats.tokens, abs=1e-5)
    assert stats.mean_depth == LAYERS
    assert stats.exit_share == 0
    assert (output.exit_layers == LAYERS).all()
    assert "fewer channels" in str(stats)
    if runs_on == "native" and name in ("llama", "gemma2", "phi3"):
        assert stats.runs_on == "native"


def test_tokens_may_be_sure_at_the_embedding(runs_on: str) -> None:
    model = soft_model(build_tiny("llama"), "soft", {-1: "lens", 1: "lens"})
    found = assert_simulated(model, generated(model, prompt(3, PROMPT)), PROMPT)
    assert model.exit_stats.runs_on == runs_on
    assert (found.soft_exits[:, PROMPT:] == 0).any()


@pytest.fixture(scope="module")
def micro_soft(micro_model: MicroModel) -> SedacForCausalLM:
    """The micro model with soft exits."""
    model = micro_exits(micro_model)
    texts = micro_documents(micro_model.language, 20, seed=3)
    model.set_channel_order(channel_order(model.base, texts))
    assert model.cascade is not None
    model.set_cascade(replace(model.cascade, strategy="soft", steepness=4.0))
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_micro_model_writes_what_it_is_scored_on(
    micro_model: MicroModel, micro_soft: SedacForCausalLM, strategy: str, runs_on: str
) -> None:
    assert micro_soft.cascade is not None
    micro_soft.set_cascade(replace(micro_soft.cascade, strategy=strategy))
    micro_soft._assembly = None  # the pass is chosen anew
    drawn = micro_model.language.documents(4, seed=77, length=10)
    ids = torch.tensor([document.ids for document in drawn])
    output = micro_soft.generate(
        ids, max_new_tokens=24, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    found = assert_simulated(micro_soft, output, 10)
    assert float((found.soft_exits[:, 10:] >= 0).float().mean()) > 0.1
    assert float(found.kept_shares.min()) < 0.8
    assert micro_soft.exit_stats.runs_on == runs_on


def test_rows_have_the_bits_they_have_alone(llama: PreTrainedModel) -> None:
    model = soft_model(llama)
    ids = prompt(4, PROMPT)
    together = generated(model, ids)
    assert model.exit_stats.runs_on == "native"
    assert 0 < model.exit_stats.soft_exit_share < 1
    for row in range(4):
        alone = generated(model, ids[row : row + 1])
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert all(
            torch.equal(a[0], b[row]) for a, b in zip(alone.logits, together.logits, strict=True)
        )


def test_padding_beams_and_sampling_work(llama: PreTrainedModel) -> None:
    model = soft_model(llama)
    ids = prompt(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, 9)
    plain = generated(model, ids).sequences[:, 6:]
    found = generated(model, padded, attention_mask=mask).sequences[:, 9:]
    assert torch.equal(plain, found)
    beams = model.generate(ids, max_new_tokens=4, num_beams=2, eos_token_id=None)
    assert beams.shape == (2, 10)
    assert generated(model, ids, sample=True).sequences.shape == (2, 6 + NEW)


def test_a_cache_that_is_handed_in_goes_on(llama: PreTrainedModel, runs_on: str) -> None:
    model = soft_model(llama)
    ids = prompt(1, PROMPT)
    whole = generated(model, ids).sequences
    first = model.generate(
        ids, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    more = model.generate(
        first.sequences, max_new_tokens=NEW - 3, do_sample=False, eos_token_id=None,
        past_key_values=first.past_key_values,
    )  # fmt: skip
    assert more.shape == whole.shape
    # The token that was last is a prompt now, and prompts are run whole.
    assert torch.equal(more[:, : PROMPT + 3], whole[:, : PROMPT + 3])


def test_exact_and_plain_modes_are_untouched(llama: PreTrainedModel) -> None:
    model = soft_model(llama, kinds={1: "block"})
    ids = prompt(2, PROMPT)
    expected = llama.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for mode in ("off", "plain", "exact"):
        found = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, sedac_mode=mode
        )
        assert torch.equal(found, expected), mode


def test_settled_models_can_be_soft_for_a_while(llama: PreTrainedModel) -> None:
    model = soft_model(llama, kinds={1: "feedback"}, kv_mode="settle")
    ids = prompt(2, PROMPT)
    assert_simulated(model, generated(model, ids), PROMPT)
    hard = replace(model.cascade, strategy="hard")
    model.exit_stats.reset()
    with model.cascade_replaced(hard):
        generated(model, ids)
    assert model.exit_stats.exit_share > 0
    assert model.exit_stats.soft_exit_share == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, strategy: str) -> None:
    folder = save_base(tmp_path / "base")
    model = soft_model(load_base(folder), strategy, base_model_name_or_path=str(folder))
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "artefact")
    loaded = SedacForCausalLM.from_pretrained(tmp_path / "artefact")
    assert loaded.config.strategy == strategy
    assert loaded.cascade.strategy == strategy
    assert loaded.cascade.steepness == 6.0
    for found, expected in zip(
        loaded.channel_order.layers, model.channel_order.layers, strict=True
    ):
        assert torch.equal(found, expected)
    ids = prompt(2, 12)
    expected = model(ids, exits="simulate")
    found = loaded(ids, exits="simulate")
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.kept_shares, expected.kept_shares)


def test_soft_rules_can_be_certified_and_then_act(tmp_path: Path, micro_model: MicroModel) -> None:
    folder = micro_model.save(tmp_path / "base")
    model = micro_exits(micro_model, base_model_name_or_path=str(folder), kv_mode="settle")
    texts = micro_documents(micro_model.language, 150, seed=11)
    model.set_channel_order(channel_order(model.base, texts[:20]))
    assert model.cascade is not None
    rules = replace(model.cascade, strategy="adaptive-soft", steepness=2.0)
    policy = Policy(rules, estimated_delta=0.0, exit_share=0.5, cost=0.9)
    target = RiskTarget(epsilon=0.3, clip=1.0)
    found = certify(model, texts[20:], [policy], target=target)
    expected = score_documents(model, texts[20:], rules)
    assert found.policy == policy
    assert found.documents == 130
    low, high = found.interval
    full = score_documents(model, texts[20:], exits="off")
    assert low <= (expected.mean_nll - full.mean_nll).mean() <= high
    model.set_cascade(rules)
    model.save_pretrained(tmp_path / "artefact", certificate=found, tokenizer=micro_model.tokenizer)
    loaded = SedacForCausalLM.from_pretrained(tmp_path / "artefact", mode="certified")
    assert loaded.exits_off_reason is None
    assert loaded.certificate.policy.cascade == loaded.cascade == rules
    loaded.generate(torch.tensor([texts[0].ids[:8].tolist()]), max_new_tokens=20, do_sample=False)
    assert loaded.exit_stats.soft_exit_share > 0
    loaded.set_cascade(replace(rules, steepness=3.0))
    loaded.save_pretrained(tmp_path / "other", tokenizer=micro_model.tokenizer)
    assert not (tmp_path / "other" / "certificate.json").exists()


def test_an_order_can_be_added_to_a_hard_artefact(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    model = soft_model(load_base(folder), base_model_name_or_path=str(folder))
    model.set_cascade(replace(model.cascade, strategy="hard"))
    order, digests = model.channel_order, []
    for given in (None, order):
        model.set_channel_order(given)
        model.save_pretrained(tmp_path / "artefact")
        digests.append(SedacForCausalLM.from_pretrained(tmp_path / "artefact").origin.digest)
    assert digests[0] == digests[1]
    model.set_cascade(replace(model.cascade, strategy="soft"))
    model.save_pretrained(tmp_path / "artefact")
    assert SedacForCausalLM.from_pretrained(tmp_path / "artefact").origin.digest != digests[0]


def test_a_collector_hears_how_much_was_skipped(llama: PreTrainedModel, runs_on: str) -> None:
    model = soft_model(llama)
    collector = SEDACMetricsCollector([0, 2])
    model.attach_metrics(collector)
    generated(model, prompt(3, PROMPT))
    collector.flush()
    stats = model.exit_stats
    analysis = collector.get_layer_analysis()
    assert {k: v["exits"] for k, v in analysis.items()} == stats.soft_exits_by_layer
    skipped = 0.0
    for layer, found in analysis.items():
        if found["exits"]:
            assert 0 < found["mean_soft_exit_ratio"] < 1
            tail = (LAYERS - 1 - layer) / LAYERS
            skipped += tail * found["exits"] * found["mean_soft_exit_ratio"]
    assert skipped / stats.tokens == pytest.approx(1 - stats.mean_kept_share, abs=1e-5)


def test_online_calibration_says_that_it_is_for_hard_exits(llama: PreTrainedModel) -> None:
    model = soft_model(llama)
    with pytest.raises(CalibrationError, match="watches hard exits"):
        model.attach_calibration()


def test_half_precision_runs(runs_on: str) -> None:
    model = soft_model(build_tiny("llama", dtype=torch.bfloat16))
    output = generated(model, prompt(2, PROMPT))
    assert all(torch.isfinite(logits).all() for logits in output.logits)
    assert model.exit_stats.soft_exit_share > 0
