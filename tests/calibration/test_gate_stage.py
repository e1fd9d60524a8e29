"""What `fit` learns gates on is what the running model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sedac_hf.calibration.gate_stage import TracedSplit, fit_fusion
from sedac_hf.calibration.measurement import collect_traces
from sedac_hf.calibration.recalibration import calibrate, trace_documents
from sedac_hf.calibration.states import BaseStates
from sedac_hf.calibration.token_facts import collect_facts
from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.core.row_history import entropy_of
from tests.calibration.synthetic import cost_model
from tests.core.gated import PARTS, gated_model
from tests.micro_exits import micro_documents
from tests.micro_model import MicroModel

KINDS = {0: "lens", 2: "lens"}


def all_ids(documents):
    return torch.from_numpy(np.stack([d.ids for d in documents]))


@pytest.mark.parametrize("kind", ["static", "gated"])
def test_fused_traces_are_what_the_running_model_sees(micro_model: MicroModel, kind):
    documents = micro_documents(micro_model.language, 5, seed=8)
    ids = all_ids(documents)
    model = gated_model(micro_model.model, {"fusion": kind}, ids, KINDS)
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
