"""Gates that go by the attention: the same places in every loop, and by a reference of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.calibration import DualMetricCalibration, OnlineCalibration
from sedac_hf.core.attention_spread import Spread
from sedac_hf.core.cascade_config import CascadeConfig
from sedac_hf.core.cascade_state import StepContext
from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.fused_gates import CheckpointFusion, GateWeights
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.simulate import simulate
from sedac_hf.evaluation.settled_scoring import score_policies
from sedac_hf.modeling import SedacForCausalLM
from sedac_hf.testing.noise import NoisyPass
from tests.artefacts import load_base, save_base
from tests.core.gated import gated_model
from tests.core.test_attention_spread import by_weights
from tests.core.test_gates_in_use import GREEDY, left, texts
from tests.evaluation.wrapped import random_documents
from tests.native import behind, prompted, started
from tests.soft import soft_model
from tests.tiny_models import build_tiny, prompt
from tests.wrapping import wrap

PASSES = pytest.mark.parametrize("which", ["native", "modules"])


@pytest.fixture
def chosen(which: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The pass that runs the layers."""
    monkeypatch.setenv("SEDAC_PASS", "modules" if which == "modules" else "auto")
    return which


def attentive(base: PreTrainedModel, fusion: str = "gated", **values: Any) -> SedacForCausalLM:
    options = {"fusion": fusion}
    return gated_model(base, options, texts(), sure=0.3, share=0.7, attentive=True, **values)


@PASSES
@pytest.mark.parametrize("kv_mode", ["propagate", "settle"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_generation_is_the_simulation(chosen: str, name: str, kv_mode: str) -> None:
    model = attentive(build_tiny(name), kv_mode=kv_mode)
    ids, mask = texts(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = 0
    torch.manual_seed(5)
    drawn = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 0}
    output = model.generate(ids, attention_mask=mask, **drawn)
    if kv_mode == "settle":
        assert model.assembly.choices.best().name == chosen
    said = output.sequences.shape[1] - 9
    whole = torch.cat([mask, torch.ones(3, said, dtype=torch.long)], dim=1)
    positions = (whole.cumsum(-1) - 1).clamp_min(0)
    found = model(
        output.sequences, attention_mask=whole, position_ids=positions, use_cache=False,
        exits="simulate", exit_start=9,
    )  # fmt: skip
    assert len(set(left(output).flatten().tolist())) > 1
    assert torch.equal(found.exit_layers[:, 9:-1], left(output))


def reference(model: SedacForCausalLM, ids: Tensor) -> tuple[np.ndarray, Tensor]:
    """Static risks of settled exits from eager weights, and where the rules let tokens leave."""
    base = model.base
    hidden = base(ids, output_hidden_states=True, use_cache=False).hidden_states
    spread = by_weights(base, ids, None)
    before, risks = hidden[0], []
    layers = torch.full(ids.shape, 4)
    confidence, most = torch.zeros(ids.shape), 0.0
    for k, rule in enumerate(model.cascade.layers):
        state = hidden[rule.layer_idx + 1]
        weights = model.gates.fusion[k].risk
        turn = 1 - torch.cosine_similarity(state, before, dim=-1)
        with torch.no_grad():
            seen = (model.probes.risk(k, state), turn, spread[rule.layer_idx])
        shares = weights.weights / weights.weights.sum()
        parts = zip(seen, weights.thresholds, shares, strict=False)
        risk = sum(float(w) * r / float(t) for r, t, w in parts)
        own = ((rule.threshold - risk) / rule.threshold).clamp(0, 1)
        confidence = rule.decay * confidence + rule.weight * own
        most = rule.decay * most + rule.weight
        leaves = (confidence / most >= rule.exit_confidence) & (layers == 4)
        layers[leaves] = rule.layer_idx
        before = state
        risks.append(risk.numpy())
    return np.stack(risks, -1), layers


@PASSES
def test_it_leaves_where_a_reference_of_its_own_says(chosen: str) -> None:
    ids = texts(2, 12)
    model = gated_model(
        build_tiny("llama"), {"fusion": "static"}, texts(), share=0.6, attentive=True,
        kv_mode="settle",
    )  # fmt: skip
    output = model.generate(ids, **GREEDY)
    with torch.no_grad():
        risks, expected = reference(model, output.sequences)
    assert torch.equal(left(output), expected[:, 12:-1])
    assert len(set(left(output).flatten().tolist())) == 3
    found = model(output.sequences, use_cache=False, exits="simulate")
    known = ~found.risks.isnan().numpy()
    np.testing.assert_allclose(found.risks.numpy()[known], risks[known], rtol=1e-4, atol=1e-4)
    # Without the attention others would leave.
    for each in model.gates.fusion:
        each.risk.weights[2] = 0.0
    model.set_gates(model.gates)
    with torch.no_grad():
        assert not torch.equal(reference(model, output.sequences)[1], expected)


@pytest.mark.parametrize("kv_mode", ["propagate", "settle"])
def test_chains_over_masks_of_the_bases_own_see_it_too(kv_mode: str) -> None:
    model = attentive(build_tiny("llama4"), kv_mode=kv_mode)
    output = model.generate(texts(2, 9), **GREEDY)
    found = model(output.sequences, use_cache=False, exits="simulate", exit_start=9)
    assert len(set(left(output).flatten().tolist())) > 1
    assert torch.equal(found.exit_layers[:, 9:-1], left(output))
    if kv_mode == "settle":
        choice = model.assembly.choices.best()
        assert choice.build is ChainPass


def test_noise_of_no_strength_changes_nothing() -> None:
    model = attentive(build_tiny("llama"))
    parts, ids = model.assembly.parts, texts(2, 9)
    controller = model.assembly.controller(model.cascade)
    quiet = NoisyPass(model.shell, model.assembly.fill, [0, 2], 0.0, seed=1)
    with torch.no_grad():
        found, expected = (
            simulate(each, controller, {"input_ids": ids}, 3)
            for each in (replace(parts, passes=quiet), parts)
        )
    assert torch.equal(found.exit_layers, expected.exit_layers)
    assert torch.equal(found.risks.nan_to_num(-1), expected.risks.nan_to_num(-1))
    assert (expected.exit_layers < 4).any()


@PASSES
@pytest.mark.parametrize("kv_mode", ["propagate", "settle"])
def test_a_row_does_what_it_does_alone(chosen: str, kv_mode: str) -> None:
    model = attentive(build_tiny("llama"), kv_mode=kv_mode)
    ids = texts(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, start in enumerate((0, 3, 0)):
        alone = model.generate(ids[row : row + 1, start:], **GREEDY)
        assert torch.equal(left(alone)[0], left(together)[row])


def test_nothing_is_worked_out_where_no_gate_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Spread, "run", lambda self, *args, **kwargs: seen.append(self))
    for kv_mode in ("propagate", "settle"):
        for fusion in ("none", "gated"):
            model = gated_model(
                build_tiny("llama"), {"fusion": fusion}, texts(), sure=0.3, kv_mode=kv_mode
            )
            model.generate(texts(2, 9), **GREEDY)
            model(texts(2, 9), use_cache=False, exits="simulate")
    assert not seen


@pytest.mark.parametrize("spread", [None, torch.full((3,), torch.nan)])
def test_what_is_not_known_never_leaves(spread: Tensor | None) -> None:
    model = attentive(build_tiny("llama"))
    controller = model.assembly.controller(model.cascade)
    before, hidden = torch.randn(3, 32), torch.randn(3, 32)
    state = controller.start(3, StepContext(before=before))
    decision = controller.step(0, hidden, state, spread=spread)
    assert np.isnan(decision.risk).all()
    assert decision.tries == 0
    sure = controller.sureness(0, np.full(3, 0.9, np.float32), state)
    assert np.isnan(sure).all()
    assert np.isnan(controller.risks(0, hidden, before, spread)).all()
    known = torch.full((3,), 0.5)
    assert np.isfinite(controller.risks(0, hidden, before, known)).all()


@pytest.mark.parametrize("kind", ["embedding", "falcon"])
def test_where_there_is_no_spread_nobody_leaves(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = build_tiny("falcon" if kind == "falcon" else "llama")
    layer = -1 if kind == "embedding" else 1
    model = gated_model(
        base, {"fusion": "static"}, texts(), {layer: "lens"}, share=0.9, attentive=False
    )
    assert (left(model.generate(texts(2, 9), **GREEDY)) < 4).any()
    for each in model.gates.fusion:
        each.risk.weights[2] = 1.0
    model.set_gates(model.gates)
    output = model.generate(texts(2, 9), **GREEDY)
    assert (left(output) == 4).all()
    assert caplog.text.count("nothing leaves there") == 1
    found = model(output.sequences, use_cache=False, exits="simulate")
    assert found.risks.isnan().all()


def test_scoring_many_rules_is_simulating_each() -> None:
    model = attentive(build_tiny("llama"), kv_mode="settle")
    documents = random_documents(4)
    plain = CascadeConfig(model.cascade.layers)
    cascades = [model.cascade, plain, None, replace(model.cascade, fusion="static")]
    scores = score_policies(model, documents, cascades)
    assert scores[0].exits[:, :-1].sum() > 0
    for cascade, found in zip(cascades, scores, strict=True):
        alone = score_policies(model, documents, [cascade])[0]
        np.testing.assert_allclose(found.nll, alone.nll, rtol=1e-6)
        assert (found.exits == alone.exits).all()


@PASSES
def test_saved_and_loaded_it_leaves_at_the_same_places(chosen: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = attentive(load_base(base), base_model_name_or_path=str(base), kv_mode="settle")
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "artefact")
    again = SedacForCausalLM.from_pretrained(tmp_path / "artefact", mode="certified")
    again.set_cascade(again.cascade)
    controller = again.assembly.controller(again.cascade)
    assert controller.attentive == (0, 1)
    one, other = (m.generate(texts(2, 9), **GREEDY) for m in (model, again))
    assert torch.equal(one.exit_layers, other.exit_layers)
    assert (left(one) < 4).any()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "smollm3", "phi3"]
)
def test_the_native_pass_sees_what_the_modules_see(name: str) -> None:
    base = build_tiny(name)
    ids, tokens = prompt(2, 9), prompt(2, 4, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = prompted(base, ids, mask)
    native, modules = started(base), ModulePass(wrap(base).assembly.parts)
    native.load(cache)
    modules.load(cache)
    at = behind([9, 9], 4, [0, 4])
    for stop in range(1, 5):
        one, other, bare = Spread(), Spread(), native.embed(tokens, at.positions)
        states = native.layers(bare, at, 0, stop, spread=one)
        expected = modules.layers(modules.embed(tokens, at.positions), at, 0, stop, spread=other)
        torch.testing.assert_close(one.risk, other.risk, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(native.layers(bare, at, 0, stop), states)  # not a bit is changed
    nothing = Spread()
    native.layers(native.embed(tokens, at.positions), at, 2, 2, spread=nothing)
    assert nothing.risk is None
    native.rest(np.array([True, False]))
    some = Spread()
    native.layers(native.embed(tokens, at.positions), at, 0, 4, spread=some)
    assert some.risk[0].isnan().all()
    assert torch.equal(some.risk[1], one.risk[1])


def two_kinds(model: SedacForCausalLM, share: float) -> None:
    """Gates that go by probe and attention alone, and let about `share` of the tokens try."""
    thresholds = np.array([0.7, 1.0, 0.1, 1.0], np.float32)
    risk = GateWeights(thresholds, np.array([0.3, 0, 0.7, 0], np.float32))
    model.set_gates(GateParts((CheckpointFusion(risk, risk),) * len(model.cascade.layers)))
    closed = [replace(each, threshold=0.0) for each in model.cascade.layers]
    model.set_cascade(replace(model.cascade, layers=tuple(closed), fusion="static"))
    risks = model(texts(), use_cache=False, exits="simulate").risks.flatten(0, 1)
    rules = [
        replace(each, threshold=2.013 * float(risks[:, k].nanquantile(share)), decay=0.0)
        for k, each in enumerate(closed)
    ]
    model.set_cascade(replace(model.cascade, layers=tuple(rules)))


@PASSES
def test_soft_exits_go_by_it_too(chosen: str) -> None:
    model = soft_model(build_tiny("llama"))
    two_kinds(model, 0.5)
    ids = texts(3, 9)
    output = model.generate(ids, **GREEDY)
    found = model(output.sequences, use_cache=False, exits="simulate", exit_start=9)
    assert model.exit_stats.runs_on == chosen
    counted = found.soft_exits[:, 9:-1]
    by_layer = model.exit_stats.soft_exits_by_layer
    for k, layer in enumerate((0, 2)):
        assert by_layer[layer] == int((counted == k).sum()) > 0


@PASSES
def test_risks_of_settled_exits_are_completed_by_it(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Any] = []
    take = OnlineCalibration.take
    monkeypatch.setattr(
        OnlineCalibration, "take", lambda self, seen: (reports.append(seen), take(self, seen))
    )
    model = wrap(build_tiny("llama"), {0: "lens", 2: "lens"}, kv_mode="settle")
    two_kinds(model, 0.6)
    ids = texts(3, 9)
    limits = DualMetricCalibration(ppl_tolerance=1e9, drift_threshold=1e9)
    model.attach_calibration(limits, audit_share=1.0, full_depth_share=1.0)
    output = model.generate(ids, **GREEDY)
    found = model(output.sequences[:, :-1], use_cache=False, exits="simulate", exit_start=9)
    gone = found.exit_layers < 4
    closed = [replace(each, threshold=0.0) for each in model.cascade.layers]
    with model.cascade_replaced(replace(model.cascade, layers=tuple(closed))):
        whole = model(output.sequences[:, :-1], use_cache=False, exits="simulate").risks
    known = np.concatenate([e.risks for report in reports for e in report.judged])
    assert len(known) == int(gone.sum()) > 5
    for k in range(2):
        expected = np.sort(whole[gone][:, k].numpy())
        np.testing.assert_allclose(np.sort(known[:, k]), expected, rtol=2e-3, atol=1e-4)
