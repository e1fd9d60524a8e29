from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.calibration.documents import Document
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import document_deltas, score_documents, split_hash
from tests.evaluation.fake_model import (
    CHECKPOINT,
    LAYERS,
    FakeModel,
    documents,
    policy,
    slow_scores,
)


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_scores_are_those_of_a_walk_over_positions(threshold):
    model, some = FakeModel(), documents(23)
    cascade = None if threshold is None else policy(threshold).cascade
    found = score_documents(model, some, cascade)
    for i, document in enumerate(some):
        nll, tokens, steps, left = slow_scores(model, document, threshold)
        assert found.nll[i] == pytest.approx(nll, rel=1e-5)
        assert (found.tokens[i], found.steps[i]) == (tokens, steps)
        # The last position has no target: an exit there is not counted.
        assert found.exits[i, CHECKPOINT + 1] == left
        assert found.exits[i].sum() == steps
    total = found.exits.sum()
    out = found.exits[:, CHECKPOINT + 1].sum()
    assert found.exit_share == pytest.approx(out / total)
    assert found.mean_depth == pytest.approx(
        (out * (CHECKPOINT + 1) + (total - out) * LAYERS) / total
    )


def test_batches_respect_the_budget_and_change_nothing():
    some, cascade = documents(17), policy(0.5).cascade
    whole, small = FakeModel(), FakeModel()
    want = score_documents(whole, some, cascade)
    found = score_documents(small, some, cascade, batch_tokens=40)
    assert len(whole.forwards) == 1
    assert len(small.forwards) > 5
    assert all(rows * width <= 40 for _, (rows, width) in small.forwards)
    np.testing.assert_allclose(found.nll, want.nll, rtol=1e-6)
    np.testing.assert_array_equal(found.exits, want.exits)


def test_a_document_beyond_the_budget_runs_alone():
    model = FakeModel()
    score_documents(model, documents(4, low=12, high=13), batch_tokens=5)
    assert [shape for _, shape in model.forwards] == [(1, 12)] * 4


def test_the_budget_follows_the_vocabulary(monkeypatch):
    monkeypatch.setattr("sedac_hf.evaluation.scoring.most_logits", lambda device: 24 * 30 // 4)
    model = FakeModel()
    score_documents(model, documents(9))
    assert all(rows * width <= 30 for _, (rows, width) in model.forwards)


def test_rows_of_logits_are_summed_piecewise(monkeypatch):
    model, some = FakeModel(), documents(3)
    want = score_documents(model, some)
    monkeypatch.setattr("sedac_hf.evaluation.scoring._NLL_ROWS", 2)
    np.testing.assert_allclose(score_documents(model, some).nll, want.nll, rtol=1e-6)


def test_without_a_prompt_the_first_token_alone_is_not_scored():
    found = score_documents(FakeModel(), [Document(np.arange(8), 0)], policy(0.1).cascade)
    assert (found.tokens[0], found.steps[0]) == (7, 6)


def test_a_document_with_no_decode_step_cannot_be_harmed_and_is_marked():
    model, some = FakeModel(), [Document(np.arange(8), 7), Document(np.arange(8), 3)]
    full = score_documents(model, some)
    exited = score_documents(model, some, policy(0.1).cascade)
    assert full.tokens.tolist() == [1, 5]
    assert full.steps.tolist() == [0, 4]
    assert exited.nll[0] == full.nll[0]
    deltas = document_deltas(full, exited)
    assert np.isnan(deltas[0])
    assert np.isfinite(deltas[1])


def test_nan_under_exits_is_infinite_harm_and_nan_under_the_base_is_no_comparison():
    some = [Document(np.array([1, 2, 4, 9, 5, 7]), 2), Document(np.array([1, 2, 4, 5, 7, 8]), 2)]
    for when, want in (("simulate", [np.inf, 0.0]), ("always", [np.nan, 0.0])):
        model = FakeModel()
        model.poison = {when: 9}
        full = score_documents(model, some)
        exited = score_documents(model, some, policy(0.1).cascade)
        np.testing.assert_array_equal(document_deltas(full, exited), want)


def test_no_gradient_is_kept():
    model = FakeModel()
    model.table.requires_grad_()
    kept = []
    call = model.__class__.__call__

    class Watched(FakeModel):
        def __call__(self, **inputs):
            out = call(self, **inputs)
            kept.append(out.logits.requires_grad)
            return out

    watched = Watched()
    watched.table = model.table
    score_documents(watched, documents(2))
    assert kept == [False]
    assert torch.is_grad_enabled()


def test_nothing_to_score_is_refused():
    with pytest.raises(CalibrationError, match="no documents"):
        score_documents(FakeModel(), [])


def test_split_hash_knows_a_set():
    some = documents(5)
    assert split_hash(some) == split_hash(some[::-1])
    assert split_hash(some) != split_hash(some[:-1])
    assert len(split_hash(some)) == 16
