"""What `fit` learns gates on is what the running model sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sedac_hf.calibration.attention_price import attention_prices
from sedac_hf.calibration.costs import CheckpointCost, CostModel
from sedac_hf.calibration.gate_stage import TracedSplit, fit_fusion
from sedac_hf.calibration.measurement import collect_traces
from sedac_hf.calibration.recalibration import calibrate, trace_documents
from sedac_hf.calibration.states import BaseStates
from sedac_hf.calibration.token_facts import collect_facts
from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_history import entropy_of
from tests.calibration.synthetic import cost_model
from tests.core.gated import PARTS, gated_model
from tests.core.test_attention_spread import by_weights
from tests.micro_exits import micro_documents
from tests.micro_model import MicroModel

KINDS = {0: "lens", 2: "lens"}


def all_ids(documents):
    return torch.from_numpy(np.stack([d.ids for d in documents]))


@pytest.mark.parametrize("attentive", [False, True])
@pytest.mark.parametrize("kind", ["static", "gated"])
def test_fused_traces_are_what_the_running_model_sees(micro_model: MicroModel, kind, attentive):
    documents = micro_documents(micro_model.language, 5, seed=8)
    ids = all_ids(documents)
    model = gated_model(micro_model.model, {"fusion": kind}, ids, KINDS, attentive=attentive)
    # Every position tries everywhere, and none is sure enough.
    layers = [LayerConfig(k, 1e9, decay=0.0, min_probability=1.0) for k in KINDS]
    model.set_cascade(CascadeConfig(layers, fusion=kind))
    traces = trace_documents(model, documents)
    found = model(ids, use_cache=False, exits="simulate")
    assert (found.exit_layers == 6).all()
    first = documents[0].prompt_length - 1
    for name, values in (("risk", found.risks), ("probability", found.probabilities)):
        expected = values[:, first:-1].reshape(-1, 2).numpy()
        # Recorded states are bfloat16.
        np.testing.assert_allclose(getattr(traces, name), expected, rtol=0.03, atol=0.01)


def test_facts_are_those_of_the_position_that_predicts(micro_model: MicroModel, tmp_path: Path):
    documents = micro_documents(micro_model.language, 3, seed=8)
    ids = all_ids(documents)
    model = gated_model(micro_model.model, {}, ids, KINDS)
    states = BaseStates(tmp_path, documents, list(KINDS), 64)
    states.record(model.shell, progress=False)
    facts = collect_facts(list(model.exit_heads), model.shell, states, [2, 0])
    first = documents[0].prompt_length - 1
    assert facts.tokens.tolist() == ids[[2, 0], first:-1].flatten().tolist()
    logits = micro_model.model(ids[[2, 0]]).logits[:, first:-1].flatten(0, 1)
    np.testing.assert_allclose(facts.entropy, entropy_of(logits), rtol=1e-3, atol=1e-3)
    spread = by_weights(micro_model.model, ids[[2, 0]], None)[[0, 2], :, first:-1]
    np.testing.assert_allclose(facts.attention.T, spread.flatten(1), rtol=1e-4, atol=1e-5)
    hidden = micro_model.model(ids[[2, 0]], output_hidden_states=True).hidden_states
    for column, (one, other) in enumerate(((0, 1), (1, 3))):
        cosine = torch.cosine_similarity(hidden[one], hidden[other], dim=-1)[:, first:-1]
        expected = 1 - cosine.flatten().numpy()
        np.testing.assert_allclose(facts.consistency[:, column], expected, rtol=0.02, atol=0.01)


def test_gates_are_fitted_for_each_checkpoint(micro_model: MicroModel, tmp_path: Path):
    documents = micro_documents(micro_model.language, 40, seed=8)
    model = gated_model(micro_model.model, {}, all_ids(documents[:4]), KINDS)
    heads = list(model.exit_heads)
    states = BaseStates(tmp_path, documents, list(KINDS), 64)
    states.record(model.shell, progress=False)
    draft = torch.arange(model.config.get_text_config().vocab_size)
    splits = []
    for rows in (range(20), range(20, 40)):
        traces = collect_traces(heads, model.probes, model.shell, states, rows, draft)
        splits.append(TracedSplit(rows, traces, collect_facts(heads, model.shell, states, rows)))
    found = fit_fusion(heads, model.probes, states, *splits, cost_model(), epsilon=0.05)
    assert {gate.layer_idx for gate in found.gates} == {0, 2}
    assert {gate.gate for gate in found.gates} >= {"static risk", "static"}
    for each in found.fusion or ():
        assert "perplexity" not in each.risk.kept
    assert [len(extra) for extra in found.extra.values()] == [2, 2]
    again = fit_fusion(heads, model.probes, states, *splits, cost_model(), epsilon=0.05)
    assert [g.to_dict() for g in again.gates] == [g.to_dict() for g in found.gates]
    for report in found.modalities:
        assert report.kept == (report.worth > report.cost)
        assert report.modality != "attention"  # nobody said what it costs


@pytest.mark.parametrize("price", [0.0, 1e3])
def test_attention_that_tells_exits_apart_is_kept_if_it_pays(
    micro_model: MicroModel, tmp_path: Path, price
):
    documents = micro_documents(micro_model.language, 40, seed=8)
    kinds = {-1: "lens", **KINDS}
    model = gated_model(micro_model.model, {}, all_ids(documents[:4]), kinds)
    heads = list(model.exit_heads)
    states = BaseStates(tmp_path, documents, list(kinds), 64)
    states.record(model.shell, progress=False)
    draft = torch.arange(model.config.get_text_config().vocab_size)
    splits = []
    for rows in (range(20), range(20, 40)):
        traces = collect_traces(heads, model.probes, model.shell, states, rows, draft)
        facts = collect_facts(heads, model.shell, states, rows)
        # The attention knows the divergence, the probe knows nothing.
        known = traces.divergence / traces.divergence.max()
        facts = replace(facts, attention=np.where(np.isnan(facts.attention), np.nan, known))
        splits.append(TracedSplit(rows, replace(traces, risk=np.ones_like(traces.risk)), facts))
    costs = CostModel(
        tuple(CheckpointCost(layer, 0, 0, 0, 0, 0.5) for layer in kinds), head=0.1, depth=6
    )
    found = fit_fusion(
        heads, model.probes, states, *splits, costs,
        epsilon=0.05, attention=[0.0, price, price],
    )  # fmt: skip
    about = [r for r in found.modalities if r.modality == "attention"]
    assert {(r.layer_idx, r.gate) for r in about} == {
        (layer, gate) for layer in (0, 2) for gate in ("risk", "sureness")
    }
    for report in about:
        assert report.kept == (report.worth > report.cost)
        assert report.cost >= price
        assert report.auroc_gain > 0 or report.gate == "sureness"
    if price:
        assert not any(r.kept for r in about)
        gates = [gate for f in found.fusion for gate in (f.risk, f.sureness)]
        assert found.pays != any("attention" in gate.kept for gate in gates)
        assert found.pays or min(found.extra["gated"][1:]) >= price, "all is shown at its price"
    else:
        assert found.pays
        assert any(r.kept for r in about)
        assert "attention" not in found.fusion[0].risk.kept
        assert any("attention" in f.risk.kept for f in found.fusion[1:])


@pytest.mark.parametrize("which", ["native", "modules"])
def test_its_price_is_the_time_that_it_takes(micro_model: MicroModel, which, monkeypatch):
    monkeypatch.setenv("SEDAC_PASS", "modules" if which == "modules" else "auto")
    documents = micro_documents(micro_model.language, 6, seed=8)
    kinds = {-1: "lens", 0: "lens"}
    model = gated_model(micro_model.model, {}, all_ids(documents), kinds, kv_mode="settle")
    counted = CostModel.from_base(
        model.base_lm, model.config.checkpoint_specs(), probe_rank=model.config.probe_rank
    )
    asked = []
    run = ModulePass if which == "modules" else NativePass
    layers = run.layers

    def noted(self, hidden, at, start, stop, kept=None, spread=None):
        asked.append((start, stop, spread is not None))
        return layers(self, hidden, at, start, stop, kept, spread)

    monkeypatch.setattr(run, "layers", noted)
    by_numbers = attention_prices(model, documents, counted)
    assert not any(seen for *_, seen in asked)
    # Twenty tokens' keys of one layer, beside all weights.
    config, length = model.base_lm.config, len(documents[0])
    keys = 4 * length * config.num_key_value_heads * config.head_dim
    weights = sum(
        4 * p.numel() for part in (model.shell.layers, model.base_lm.lm_head)
        for p in part.parameters()
    )  # fmt: skip
    assert by_numbers == [0.0, pytest.approx(keys / weights, rel=1e-6)]
    prices = attention_prices(model, documents, replace(counted, source="measured"))
    assert prices[0] == 0.0
    assert 0.0 <= prices[1] < 1.0
    assert {(0, 1, True), (0, 1, False), (0, 6, False)} <= set(asked)


@pytest.mark.parametrize("name", ["gated", "routes", "decay", "all"])
def test_calibrating_anew_keeps_the_parts_that_are_in_use(micro_model: MicroModel, name):
    documents = micro_documents(micro_model.language, 120, seed=8)
    model = gated_model(
        micro_model.model, PARTS[name], all_ids(documents[:8]), KINDS, kv_mode="settle"
    )
    before = model.cascade
    certificate = calibrate(model, documents, rungs=2)
    for rung in certificate.walk:
        cascade = rung.policy.cascade
        assert (cascade.fusion, cascade.routes) == (before.fusion, before.routes)
        assert cascade.adaptive_decay == before.adaptive_decay
