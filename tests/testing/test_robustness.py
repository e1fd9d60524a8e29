"""Robustness: noise of the size that was asked for, where it was asked for, and what it changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.testing import RobustnessTest, SuiteInput, TestConfig
from sedac_hf.testing.noise import NoisyPass
from sedac_hf.testing.robustness import RobustnessOutcome, _Batch
from tests.evaluation.wrapped import random_documents, wrapped_llama
from tests.micro_exits import set_share
from tests.wrapping import rule, wrap


def robustness(model, documents, **limits):
    return RobustnessTest().run(SuiteInput(None, model, documents, TestConfig(**limits)))


def make_brittle(model, states):
    """Let the probe read the directions in which the states hardly vary."""
    probe = model.probes.probes[0]
    _, directions = torch.linalg.eigh(torch.cov(states.double().T))
    with torch.no_grad():
        probe.project.weight.copy_(directions[:, :8].T)
        probe.norm.weight.fill_(1.0)
        probe.norm.bias.zero_()
        probe.out.weight.copy_(torch.randn_like(probe.out.weight))
    set_share(model, states, 0.5)


def test_a_good_model_passes(exits, documents):
    found = robustness(exits, documents)
    assert isinstance(found, RobustnessOutcome)
    assert found.passed is True
    assert found.exit_share > 0.2
    assert found.positions == sum(len(d) - d.prompt_length for d in documents[:32])
    assert [level.strength for level in found.levels] == [0.002, 0.004, 0.01]
    assert all(0.9 < level.exits_kept <= 1 for level in found.levels)


def test_a_brittle_probe_fails_by_its_decisions(exits, documents, early_states):
    make_brittle(exits, early_states)
    found = robustness(exits, documents)
    assert found.passed is False
    worst = found.levels[-1]
    assert found.consistency == worst.decisions < 0.9
    # the base itself is not to blame
    assert worst.baseline_tokens > 0.95
    assert any("do so in both" in note for note in found.notes)


def test_stronger_noise_changes_more_and_in_the_end_too_much(exits, documents):
    found = robustness(exits, documents, noise_levels=(0.001, 0.03, 1.0))
    decisions = [level.decisions for level in found.levels]
    tokens = [level.tokens for level in found.levels]
    assert decisions == sorted(decisions, reverse=True)
    assert tokens == sorted(tokens, reverse=True)
    assert found.passed is False
    assert any("that is the base's doing" in note for note in found.notes)


@pytest.mark.parametrize("kv_mode", ["settle", "propagate"])
@pytest.mark.parametrize("kind", ["lens", "block", "feedback"])
def test_without_noise_it_reads_what_the_model_does(llama, kind, kv_mode):
    documents = random_documents(6, low=9, high=12)
    model = wrap(llama, {0: kind, 2: "lens"}, [rule(0, 1.0), rule(2, 1.5)], kv_mode=kv_mode)
    given = SuiteInput(None, model, documents, TestConfig())
    ids = torch.from_numpy(np.stack([d.ids[:9] for d in documents]))
    seen = model(ids, exits="simulate", exit_start=3)
    some = [type(d)(d.ids[:9], 3) for d in documents]
    with torch.inference_mode():
        model.assembly.prepare()
        batch = _Batch(given, some, seed=5)
        read, again = batch.read(0.0), batch.read(1e-12)
    np.testing.assert_array_equal(read.layers, seen.exit_layers[:, 3:].flatten())
    np.testing.assert_array_equal(read.tokens, seen.logits[:, 3:].argmax(-1).flatten())
    full = model(ids, exits="off").logits[:, 3:].argmax(-1).flatten()
    np.testing.assert_array_equal(read.full_tokens, full)
    assert 0 < read.left.sum() < len(read.left)
    count = len(read.layers)
    assert read.same(again)[:3] == [count, count, count]


def test_noise_has_its_size_and_stands_behind_checkpoints_only(llama):
    model = wrap(llama, {-1: "lens", 1: "lens"})
    hidden, calls = model.shell.prologue(input_ids=torch.randint(3, 90, (4, 9)), use_cache=False)

    def run(start, stop, strength, left=None, seed=3):
        passes = NoisyPass(model.shell, model.assembly.fill, [-1, 1], strength, seed)
        return passes.run(hidden, calls, start, stop, left)

    def size(states):
        return states.square().mean(-1).sqrt()

    with torch.no_grad():
        for start, stop in ((0, 0), (0, 2)):
            clean = run(start, stop, 0.0)
            noise = run(start, stop, 0.05) - clean
            ratio = size(noise) / size(clean)
            assert ratio.mean() == pytest.approx(0.05, rel=0.1)
            # the same direction at another strength
            torch.testing.assert_close(
                run(start, stop, 0.1) - clean, 2 * noise, rtol=1e-3, atol=1e-4
            )
            other = run(start, stop, 0.05, seed=4) - clean
            assert not torch.allclose(other, noise, atol=1e-4)
        assert torch.equal(run(0, 1, 0.5), run(0, 1, 0.0))
        left = torch.zeros(4, 9, 1, dtype=torch.bool)
        left[1] = True
        noisy, clean = run(0, 2, 0.5, left), run(0, 2, 0.0, left)
        assert torch.equal(noisy[1], clean[1])
        assert not torch.equal(noisy[0], clean[0])


def test_the_same_seed_gives_the_same_figures():
    model, documents = wrapped_llama(), random_documents(12)
    first, again = (robustness(model, documents) for _ in range(2))
    assert first == again
    assert robustness(model, documents, seed=1).levels != first.levels


def test_where_exits_are_not_final_it_is_skipped(exits, documents):
    found = robustness(exits, documents, mode="exact")
    assert found.passed is None
    assert "exact" in found.found
    exits.set_cascade(None)
    found = robustness(exits, documents, mode="certified")
    assert found.passed is None
    assert "no thresholds" in found.found
