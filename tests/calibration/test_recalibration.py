from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.costs import CheckpointCost, CostModel
from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.recalibration import calibrate, trace_documents
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import score_documents
from sedac_hf.modeling import SedacForCausalLM
from tests.evaluation.wrapped import LAYERS, random_documents, wrapped_llama
from tests.tiny_models import build_tiny


def generous_costs():
    """Costs under which untrained block heads pay as well, so that there is something to walk."""
    return CostModel(
        tuple(
            CheckpointCost(layer, probe=0.001, fill=0.001, attempt=0.01, gate=0.01, saved=saved)
            for layer, saved in zip(LAYERS, (0.6, 0.3), strict=True)
        ),
        head=0.1,
        depth=4,
    )


@pytest.mark.parametrize("head", ["lens", "block"])
def test_traces_are_what_the_masked_forward_sees(head):
    """Risk, probability and full-depth NLL against the forward that applies the rule."""
    model, some = wrapped_llama(head, share=0.0, gate=1.0), random_documents(6)
    traces = trace_documents(model, some)
    full = score_documents(model, some)
    for d, document in enumerate(some):
        rows = slice(*traces.doc_offsets[d : d + 2])
        assert traces.nll_full[rows].sum() == pytest.approx(full.nll[d], rel=2e-2)
        assert traces.eligible[rows].sum() == full.steps[d]
        ids = torch.from_numpy(document.ids)[None]
        seen = model(input_ids=ids, use_cache=False, exits="simulate", exit_start=3)
        # Row t of the traces is the position that predicts it; states on disk are bfloat16.
        np.testing.assert_allclose(traces.risk[rows][1:], seen.risks[0, 3:-1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("head", ["lens", "block"])
def test_a_lone_exit_costs_what_its_trace_says(head):
    """The last decode step alone may leave: no stale K/V, so the trace is the whole truth."""
    model, some = wrapped_llama(head), random_documents(4)
    traces = trace_documents(model, some)
    full = score_documents(model, some)
    for k, layer in enumerate(LAYERS):
        rules = [
            LayerConfig(at, 1e30 * (at == layer), decay=0.0, exit_confidence=2.0 * (at != layer))
            for at in LAYERS
        ]
        late = [Document(d.ids, len(d) - 2) for d in some]
        exited = score_documents(model, late, CascadeConfig(rules))
        before = score_documents(model, late)
        assert exited.exits[:, layer + 1].tolist() == [1] * 4
        rise = exited.nll - before.nll
        last = traces.doc_offsets[1:] - 1
        np.testing.assert_allclose(traces.delta_nll[last, k], rise, rtol=0.08, atol=0.08)
    assert (full.nll >= before.nll).all()


def test_a_model_gets_thresholds_a_certificate_and_uses_them():
    torch.manual_seed(0)
    model, some = wrapped_llama(), random_documents(260, low=10, high=20)
    model.set_cascade(None)
    target = RiskTarget(epsilon=0.3, delta=0.2, clip=0.6, tail_share=0.3)
    certificate = calibrate(model, some, target=target, costs=generous_costs(), rungs=4)
    assert model.certificate is certificate
    assert certificate.accepted > 0
    assert model.cascade == certificate.policy.cascade
    assert set(certificate.splits) == {"certification", "search", "held_out"}
    assert certificate.held_out.documents == 26
    assert certificate.documents == 156
    # What was certified is what acts now.
    found = score_documents(model, some, exits="simulate")
    assert found.exit_share > 0


def test_temperatures_belong_to_the_heads_and_stay():
    model, some = wrapped_llama(), random_documents(4)
    cold = trace_documents(model, some).delta_nll
    layers = [replace(layer, temperature=2.0) for layer in model.cascade.layers]
    model.set_cascade(replace(model.cascade, layers=layers))
    assert np.abs(trace_documents(model, some).delta_nll - cold).max() > 0.1
    certificate = calibrate(model, random_documents(40), costs=generous_costs(), rungs=2)
    assert certificate.walk
    for rung in certificate.walk:
        assert [layer.temperature for layer in rung.policy.cascade.layers] == [2.0, 2.0]


def test_exits_go_off_when_nothing_passes():
    model, some = wrapped_llama(), random_documents(40)
    certificate = calibrate(model, some, costs=generous_costs(), rungs=2)
    assert certificate.policy is None
    assert model.cascade is None


def test_calibration_is_repeatable():
    target = RiskTarget(epsilon=0.3, delta=0.2, clip=0.6, tail_share=0.3)
    some = random_documents(80, low=10, high=20)
    first, again = (
        calibrate(wrapped_llama(), some, target=target, costs=generous_costs(), rungs=2)
        for _ in range(2)
    )
    assert first == again


def test_too_little_to_work_with_is_refused():
    model = wrapped_llama()
    with pytest.raises(CalibrationError, match="too few"):
        calibrate(model, random_documents(1))
    bare = SedacForCausalLM.from_base(build_tiny("llama"))
    with pytest.raises(CalibrationError, match="no exit heads"):
        calibrate(bare, random_documents(50))
