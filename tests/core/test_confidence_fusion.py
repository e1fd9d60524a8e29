from __future__ import annotations

import math
from dataclasses import astuple
from functools import partial

import numpy as np
import pytest
import torch

from sedac_hf import _core
from sedac_hf.core.confidence_fusion import (
    AttentionEntropyEstimator,
    EnhancedConfidenceAccumulator,
    EntropyProbeEstimator,
    GatedFusion,
    Observation,
    PerplexityEstimator,
    TokenConsistencyEstimator,
    adaptive_confidence_decay,
)
from sedac_hf.core.fused_gates import (
    MODALITIES,
    CheckpointFusion,
    FusedGates,
    GateWeights,
    Seen,
    fusion_from_tensors,
    fusion_tensors,
)
from sedac_hf.core.probe_inference import LREProbe, ProbeManager
from sedac_hf.errors import ConfigError
from tests.core.gated import network, parts_for

WIDTH = 12


def states(rows=5, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_an_accumulator_of_one_estimator_has_the_confidence_of_the_cascade():
    probe = LREProbe(WIDTH, 4)
    accumulator = EnhancedConfidenceAccumulator(WIDTH)
    accumulator.add_estimator(EntropyProbeEstimator(probe, threshold=1.5))
    found = accumulator.compute_confidence(states(), layer_idx=3)
    risk = probe(states()).detach()
    torch.testing.assert_close(found, ((1.5 - risk) / 1.5).clamp(0, 1))


def test_several_are_weighed_by_their_shares():
    def head(hidden):
        return hidden @ torch.eye(WIDTH)

    probe = LREProbe(WIDTH, 4)
    accumulator = EnhancedConfidenceAccumulator(WIDTH)
    accumulator.add_estimator(EntropyProbeEstimator(probe, threshold=2.0), weight=0.6)
    accumulator.add_estimator(PerplexityEstimator(WIDTH, WIDTH, 4.0, head=head), weight=0.2)
    assert accumulator.weights == pytest.approx((0.75, 0.25))
    risk = accumulator.compute_risk(Observation(states()))
    surprise = -states().softmax(-1).amax(-1).log()
    expected = 0.75 * probe(states()).detach() / 2 + 0.25 * surprise / 4
    torch.testing.assert_close(risk.float(), expected)


def test_a_known_probability_is_taken_as_it_is():
    estimator = PerplexityEstimator(WIDTH, 100)
    chance = torch.tensor([1.0, 0.5, 0.0])
    found = estimator.risk(Observation(states(3), probability=chance))
    assert found.tolist() == pytest.approx([0.0, math.log(2), math.inf])
    accumulator = EnhancedConfidenceAccumulator(WIDTH)
    accumulator.add_estimator(estimator)
    confidence = accumulator.compute_confidence(states(3), 0, probability=chance)
    assert confidence.tolist() == pytest.approx([1.0, 1 - math.log(2), 0.0])


def test_consistency_is_the_turn_since_the_layer_before():
    accumulator = EnhancedConfidenceAccumulator(WIDTH)
    accumulator.add_estimator(TokenConsistencyEstimator(threshold=2.0))
    here = states()
    assert accumulator.compute_confidence(here, 3).tolist() == [0.0] * 5  # nothing before it
    assert accumulator.compute_confidence(3 * here, 7).tolist() == pytest.approx([1.0] * 5)
    assert accumulator.compute_confidence(-here, 9).tolist() == pytest.approx([0.0] * 5)
    # A layer that is not deeper begins anew, and so does another batch.
    assert accumulator.compute_confidence(-here, 9).tolist() == [0.0] * 5
    assert accumulator.compute_confidence(states(3), 11).tolist() == [0.0] * 3


def test_attention_is_judged_by_its_spread():
    estimator = AttentionEntropyEstimator()
    even = torch.full((1, 2, 8), 1 / 8)
    sharp = torch.eye(8)[:1].expand(1, 2, 8)
    masked = torch.cat([torch.full((1, 2, 4), 1 / 4), torch.zeros(1, 2, 4)], -1)
    found = [float(estimator.risk(Observation(states(1), attention=a))) for a in
             (even, sharp, masked)]  # fmt: skip
    assert found == pytest.approx([1.0, 0.0, 1.0])
    assert estimator.risk(Observation(states(2))).isnan().all()


def test_nan_gives_no_confidence():
    accumulator = EnhancedConfidenceAccumulator(WIDTH, use_gated_fusion=True)
    accumulator.add_estimator(EntropyProbeEstimator(LREProbe(WIDTH, 4), threshold=1e6))
    accumulator.add_estimator(TokenConsistencyEstimator(), weight=1e-3)
    accumulator.compute_confidence(states(), 1)
    broken = states(seed=1)
    broken[2, 3] = torch.nan
    found = accumulator.compute_confidence(broken, 2)
    assert found[2] == 0
    assert (found[[0, 1, 3, 4]] > 0.9).all()


def test_an_untrained_gate_gives_the_fixed_weights_and_a_trained_one_sums_to_one():
    fixed = torch.tensor([0.2, 0.0, 0.8])
    gate = GatedFusion(WIDTH, 3)
    found = gate(states(), fixed)
    torch.testing.assert_close(found, fixed.expand(5, 3))
    trained = network(WIDTH, 3, seed=1)(states(), fixed)
    torch.testing.assert_close(trained.sum(-1), torch.ones(5))
    assert (trained[:, 1] == 0).all()
    assert not torch.allclose(trained, fixed.expand(5, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EnhancedConfidenceAccumulator(0), "hidden_dim"),
        (lambda: EntropyProbeEstimator(LREProbe(4), threshold=0.0), "threshold"),
        (lambda: EntropyProbeEstimator(LREProbe(4), threshold=float("nan")), "threshold"),
        (lambda: PerplexityEstimator(4, 1), "vocab_size"),
        (lambda: GatedFusion(0, 2), "positive sizes"),
        (
            lambda: EnhancedConfidenceAccumulator(4).add_estimator(TokenConsistencyEstimator(), 0),
            "weight",
        ),
        (lambda: EnhancedConfidenceAccumulator(4).compute_confidence(states(), 1), "4 wide"),
        (lambda: EnhancedConfidenceAccumulator(WIDTH).compute_confidence(states(), 1), "Add"),
        (lambda: GateWeights(np.ones(3, np.float32), np.ones(4, np.float32)), "thresholds"),
        (lambda: GateWeights(np.ones(4, np.float32), np.zeros(4, np.float32)), "above 0"),
        (lambda: GateWeights(np.ones(4, np.float32), -np.ones(4, np.float32)), "at least 0"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_decay_is_the_formula_within_its_bounds():
    assert adaptive_confidence_decay(0.9, 0.0) == pytest.approx(0.9)
    assert adaptive_confidence_decay(0.8, 0.25, 0.1) == pytest.approx(0.8 * 0.75 * 1.1)
    assert adaptive_confidence_decay(0.9, 1.0, 0.5) == pytest.approx(0.5)
    assert adaptive_confidence_decay(0.9, 0.0, 1.0) == pytest.approx(0.99)
    rows = np.array([0.0, 0.25, 1.0, np.nan], np.float32)
    found = adaptive_confidence_decay(0.8, rows, np.zeros(4, np.float32))
    assert found.dtype == np.float32
    assert found[:3].tolist() == pytest.approx([0.8, 0.6, 0.5])
    assert np.isnan(found[3])


def test_the_first_gate_cannot_know_the_exits_probability():
    some = GateWeights(np.ones(4, np.float32), np.ones(4, np.float32))
    with pytest.raises(ConfigError, match="cannot know"):
        CheckpointFusion(some, some)


def by_core(probe, hidden):
    return torch.from_numpy(probe.risk(hidden.numpy()))


@pytest.mark.parametrize("kind", ["static", "gated"])
def test_gates_work_out_what_they_need_and_no_more(kind):
    probes = ProbeManager.build(2, WIDTH, 8)
    packed = [_core.Probe(*astuple(probes.native(k))) for k in range(2)]
    native = [partial(by_core, probe) for probe in packed]
    gates = FusedGates(parts_for(2, 8, 10).fusion, kind, probes, native)
    assert gates.needs_before(0)
    seen = Seen(Observation(states(), states(seed=1)))
    risk = gates.risk(1, seen)
    assert set(seen.risks) == {"entropy", "consistency"}
    own = np.array([0.9, 0.5, np.nan, 1.0, 0.1], np.float32)
    sure = gates.sureness(1, seen, own)
    assert np.isnan(sure[2])
    rest = np.delete(sure, 2)
    assert ((rest > 0) & (rest <= 1)).all()
    # A row says the same whatever its company.
    for row in range(5):
        alone = Seen(Observation(states()[row : row + 1], states(seed=1)[row : row + 1]))
        assert gates.risk(1, alone)[0] == risk[row]
        assert np.array_equal(
            gates.sureness(1, alone, own[row : row + 1]), sure[row : row + 1], equal_nan=True
        )


def test_fusion_survives_tensors():
    fusion = parts_for(2, 8, 10).fusion
    tensors = fusion_tensors(fusion)
    again = fusion_from_tensors(tensors, 2)
    assert fusion_tensors(again).keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in fusion_tensors(again).items())
    assert len(MODALITIES) == 4
    for change, words in (
        ({"fusion.0.risk.weights": None}, "missing"),
        ({"fusion.5.risk.weights": torch.ones(4)}, "no place"),
        ({"fusion.1.sureness.network.out.bias": torch.ones(7)}, "malformed"),
    ):
        broken = {name: v for name, v in (tensors | change).items() if v is not None}
        with pytest.raises(ConfigError, match=words):
            fusion_from_tensors(broken, 2)
