"""Fusion weights on invented evidence, of which it is known what counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.calibration.fusion_training import Evidence, fit_gate, static_weights
from sedac_hf.core.fused_gates import MODALITIES

BUDGET = 0.01
FREE = {name: 0.0 for name in (*MODALITIES, "network")}


def evidence(weights, count=6000, noise=0.02, seed=0, gate=False):
    """Divergence is a weighted sum of the modalities; with `gate` the weights differ by token."""
    rng = np.random.default_rng(seed)
    risks = {
        name: rng.gamma(1.0, 1.0, count).astype(np.float32)
        for name in ("entropy", "consistency", "perplexity")
    }
    features = rng.normal(size=(count, 8)).astype(np.float32)
    table = np.stack([risks[name] for name in weights], axis=1)
    shares = np.tile(np.array(list(weights.values()), np.float64), (count, 1))
    if gate:
        turned = features[:, 0] > 0
        shares[turned] = shares[turned][:, ::-1]
    log = np.maximum((table * shares).sum(axis=1) * 0.4 + rng.normal(0, noise, count), 0)
    divergence = np.expm1(log).astype(np.float32)
    agree = rng.random(count) > 1 - np.exp(-divergence)
    return Evidence(risks, divergence, agree, torch.from_numpy(features))


def only(weights, *names):
    return {
        name: weight for name, weight in zip(MODALITIES, weights, strict=True) if weight > 0
    }.keys() == set(names)


def test_planted_weights_are_found_again():
    planted = {"entropy": 0.5, "consistency": 0.2, "perplexity": 0.3}
    seen = evidence(planted, noise=0.0)
    # Free of noise and of tokens whose divergence is clamped.
    found = static_weights(seen, list(planted), "entropy")
    by_name = dict(zip(MODALITIES, found.tolist(), strict=True))
    for name, weight in planted.items():
        assert by_name[name] == pytest.approx(weight, abs=0.05)
    assert by_name["attention"] == 0


def test_no_weight_is_negative():
    seen = evidence({"entropy": 1.0})
    # What falls as the divergence rises gets no weight.
    odd = (3.0 - np.log1p(seen.divergence)).clip(0).astype(np.float32)
    seen = Evidence(seen.risks | {"consistency": odd}, seen.divergence, seen.agree, seen.features)
    found = static_weights(seen, ["entropy", "consistency"], "entropy")
    assert only(found, "entropy")


def test_without_any_signal_the_base_has_it_all():
    seen = evidence({"entropy": 1.0})
    still = Evidence(seen.risks, np.zeros_like(seen.divergence), seen.agree, seen.features)
    assert only(static_weights(still, ["entropy", "perplexity"], "perplexity"), "perplexity")


def fitted(planted, costs=FREE, **values):
    seen, fresh = evidence(planted, seed=1, **values), evidence(planted, seed=2, **values)
    return fit_gate(4, "sureness", "perplexity", seen, fresh, budget=BUDGET, saved=0.5, costs=costs)


def test_a_modality_that_counts_is_kept_and_a_useless_one_is_dropped():
    gate = fitted({"entropy": 0.6, "perplexity": 0.4})
    kept = {report.modality: report.kept for report in gate.reports}
    assert kept["entropy"]
    assert not kept["consistency"]
    assert only(gate.weights.weights, "entropy", "perplexity")
    assert gate.offered.kept[:2] == gate.weights.kept
    assert gate.share["static"] > gate.share["base"]
    assert gate.auroc["static"] > gate.auroc["base"]


def test_a_modality_that_costs_more_than_it_saves_is_dropped():
    cheap = fitted({"entropy": 0.6, "perplexity": 0.4})
    gain = {r.modality: r for r in cheap.reports}["entropy"]
    assert gain.worth == pytest.approx(gain.share_gain * 0.5)
    dear = fitted({"entropy": 0.6, "perplexity": 0.4}, FREE | {"entropy": gain.worth * 1.01})
    assert only(dear.weights.weights, "perplexity")
    assert dear.weights.network is None
    assert only(dear.offered.weights, "entropy", "perplexity"), (
        "what it would be is told all the same"
    )
    assert dear.offered.network is not None
    assert np.array_equal(cheap.offered.weights, dear.offered.weights)
    assert not {r.modality: r.kept for r in dear.reports}["entropy"]


def test_a_network_finds_weights_that_differ_by_token():
    gate = fitted({"entropy": 0.95, "perplexity": 0.05}, gate=True)
    assert gate.weights.network is not None
    assert gate.auroc["gated"] > gate.auroc["static"] + 0.01
    assert {r.modality: r.kept for r in gate.reports}["network"]


def test_evidence_that_is_not_known_lets_nothing_leave():
    planted = {"entropy": 0.6, "perplexity": 0.4}
    seen, fresh = evidence(planted, seed=1), evidence(planted, seed=2)
    for each in (seen, fresh):
        each.risks["consistency"][:] = np.nan
    gate = fit_gate(0, "risk", "entropy", seen, fresh, budget=BUDGET, saved=0.5, costs=FREE)
    assert "consistency" not in gate.weights.kept
    assert np.isfinite(gate.weights.thresholds).all()
