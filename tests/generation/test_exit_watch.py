"""Exits held against full depth while text is written: the figures are those of whole forwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sedac_hf.calibration import OnlineCalibration
from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.recalibration import trace_documents
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.generation.cycle import Cycle
from sedac_hf.generation.governor import Governor
from tests.generation.test_settled import GIVEN, prompts, settled
from tests.wrapping import ALWAYS

NAN = float("nan")


@pytest.fixture
def seen(monkeypatch):
    """What calls report, in order."""
    reports = []
    take = OnlineCalibration.take

    def noted(self, observations):
        reports.append(observations)
        take(self, observations)

    monkeypatch.setattr(OnlineCalibration, "take", noted)
    return reports


@pytest.fixture
def drafts(monkeypatch):
    """Exact mode asks its head in every cycle, whatever it costs."""
    monkeypatch.setattr(Governor, "begin", lambda self: Cycle(on=True))
    monkeypatch.setattr(Governor, "worth_asking", lambda self, promise: True)
    monkeypatch.setattr(Governor, "worth_a_level", lambda self, *values: False)


def generous(model, **settings):
    """Attach with limits that nothing reaches, every exit looked at."""
    from sedac_hf.calibration import DualMetricCalibration

    limits = DualMetricCalibration(ppl_tolerance=1e9, drift_threshold=1e9)
    return model.attach_calibration(
        limits, **{"audit_share": 1.0, "full_depth_share": 1.0, **settings}
    )


def divergences(model, sequences, start):
    """Divergence of each exit on whole sequences, row by row, and what the forward says."""
    with torch.no_grad():
        sim = model(input_ids=sequences, use_cache=False, exits="simulate", exit_start=start)
        full = model.base(sequences).logits.log_softmax(-1)
    found = (full.exp() * (full - sim.logits.log_softmax(-1))).sum(-1)
    return found, sim


def judged(reports):
    return [each for report in reports for each in report.judged]


def close(found, expected):
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["lens", "feedback"])
def test_settled_exits_are_held_against_the_base_and_no_token_changes(kind, seen):
    model, ids = settled(kind), prompts()
    options = {**GIVEN, "return_dict_in_generate": True, "sedac_mode": "certified"}
    before = model.generate(ids, **options)
    generous(model)
    out = model.generate(ids, **options)
    assert torch.equal(out.sequences, before.sequences)
    assert torch.equal(out.exit_layers, before.exit_layers)
    expected, sim = divergences(model, out.sequences[:, :-1], ids.shape[1])
    left = sim.exit_layers < 4
    assert 5 < int(left.sum()) < left[:, 6:].numel()
    exits = judged(seen)
    close(np.concatenate([e.divergence for e in exits]), expected[left].numpy())
    # Risks behind the exit, where the record of the step has none, are those of the base's states.
    with torch.no_grad():
        model.set_cascade(CascadeConfig([replace(r, threshold=0.0) for r in model.cascade.layers]))
        whole = model(input_ids=out.sequences[:, :-1], use_cache=False, exits="simulate").risks
    close(np.concatenate([e.risks for e in exits])[:, 1], whole[left][:, 1].numpy())
    tokens = sum(report.tokens for report in seen)
    assert tokens == sum(report.passed for report in seen) == left[:, 6:].numel()


def test_every_token_stands_in_the_histograms_once(seen):
    model, ids = settled(), prompts()
    generous(model)
    out = model.generate(ids, return_dict_in_generate=True, sedac_mode="certified", **GIVEN)
    model.set_cascade(CascadeConfig([replace(r, threshold=0.0) for r in model.cascade.layers]))
    whole = model(input_ids=out.sequences[:, :-1], use_cache=False, exits="simulate").risks[:, 6:]
    for k in range(2):
        risks = [(r, w) for report in seen for at, r, w in report.risks if at == k]
        assert {w for _, w in risks} == {1.0}
        close(np.concatenate([r for r, _ in risks]), whole[..., k].flatten().numpy())


@pytest.mark.parametrize("kv_mode", ["settle", "propagate"])
def test_the_loop_of_transformers_holds_exits_too(kv_mode, seen, monkeypatch):
    model, ids = settled("lens"), prompts()
    model.config.kv_mode = kv_mode
    generous(model)
    # Outputs of hidden states would keep exits off; a cache of a class of its own does not.
    monkeypatch.setattr("sedac_hf.generation.exact.why_not", lambda *_: "for this test")
    out = model.generate(ids, return_dict_in_generate=True, sedac_mode="certified", **GIVEN)
    exits = judged(seen)
    if kv_mode == "settle":
        expected, sim = divergences(model, out.sequences[:, :-1], ids.shape[1])
        left = sim.exit_layers < 4
        assert int((out.exit_layers < 4).sum()) == int(left.sum()) > 0
    else:
        # Every exit is run on: nothing leaves, so K/V are the base's own.
        assert (out.exit_layers == 4).all()
        assert torch.equal(out.sequences, model.base.generate(ids, **GIVEN))
        model.config.kv_mode = "settle"
        expected, sim = divergences(model, out.sequences[:, :-1], ids.shape[1])
        left = sim.exit_layers < 4
    close(np.concatenate([e.divergence for e in exits]), expected[left].numpy())
    known = np.concatenate([e.risks for e in exits])
    assert np.isfinite(known).all()


def test_rows_that_have_ended_are_not_counted(seen, monkeypatch):
    model, ids = settled("lens"), prompts()
    monkeypatch.setattr("sedac_hf.generation.exact.why_not", lambda *_: "for this test")
    free = model.generate(ids, sedac_mode="certified", **GIVEN)
    end = int(free[0, 8])  # the third new token of the first row
    generous(model)
    out = model.generate(ids, sedac_mode="certified", **{**GIVEN, "eos_token_id": end})
    new = out[:, 6:]
    ended = (new == end).int().cumsum(1)
    alive = int(((ended - (new == end).int()) == 0)[:, 1:].sum())
    assert sum(report.tokens for report in seen) == alive < new[:, 1:].numel()


@pytest.mark.parametrize("kind", ["lens", "block", "feedback"])
def test_exact_mode_sees_every_verified_token(kind, seen, drafts):
    model, ids = settled(kind, layers=(1,)), prompts()
    base = model.base.generate(ids, **GIVEN)
    rules = [replace(model.cascade.layers[0], threshold=ALWAYS)]
    model.set_cascade(CascadeConfig(rules))
    generous(model)
    out = model.generate(ids, sedac_mode="exact", **GIVEN)
    assert torch.equal(out, base)
    found = np.concatenate([e.divergence for e in judged(seen)])
    risks = np.concatenate([r for report in seen for _, r, _ in report.risks])
    tokens = sum(report.tokens for report in seen)
    assert len(found) == len(risks) == tokens == sum(r.passed_at[0] for r in seen)
    # The states of traces are kept in bfloat16, and the last token's exit is never asked for.
    traces = trace_documents(model, [Document(row.numpy(), 6) for row in out])
    expected = traces.divergence[traces.eligible, 0]
    assert len(expected) - len(ids) * 3 <= len(found) <= len(expected)
    nearest = np.abs(found[:, None] - expected[None, :]).min(axis=1)
    assert (nearest < 0.05 * found + 0.02).all()
    assert found.mean() == pytest.approx(expected.mean(), rel=0.15)


def test_a_broken_off_call_reports_what_it_saw(seen):
    model, ids = settled("lens"), prompts()
    generous(model)

    class Stop(Exception):
        pass

    class Streamer:
        def __init__(self):
            self.count = 0

        def put(self, value):
            self.count += 1
            if self.count == 6:
                raise Stop

        def end(self):
            pass

    with pytest.raises(Stop):
        model.generate(ids[:1], streamer=Streamer(), sedac_mode="certified", **GIVEN)
    assert sum(report.tokens for report in seen) >= 3
