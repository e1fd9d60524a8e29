from __future__ import annotations

import math

import numpy as np
import pytest

from sedac_hf.calibration.documents import Document
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.perplexity import paired_perplexity
from tests.evaluation.fake_model import (
    CHECKPOINT,
    LAYERS,
    FakeModel,
    documents,
    policy,
    slow_scores,
)


def test_perplexities_are_over_all_tokens_and_paired():
    model, some = FakeModel(threshold=0.4), documents(40)
    found = paired_perplexity(model, some, seed=3)
    base = [slow_scores(model, d, None) for d in some]
    exited = [slow_scores(model, d, 0.4) for d in some]
    tokens = sum(row[1] for row in base)
    base_nll, sedac_nll = (sum(row[0] for row in rows) / tokens for rows in (base, exited))
    assert found.base_ppl == pytest.approx(math.exp(base_nll), rel=1e-5)
    assert found.sedac_ppl == pytest.approx(math.exp(sedac_nll), rel=1e-5)
    assert found.ppl_increase == pytest.approx(found.sedac_ppl / found.base_ppl - 1, rel=1e-6)
    low, high = found.ppl_increase_ci95
    assert low < found.ppl_increase < high
    rises = [(a[0] - b[0]) / b[1] for a, b in zip(exited, base, strict=True)]
    assert found.document_increase == pytest.approx(math.expm1(np.mean(rises)), rel=1e-4)
    assert (found.tokens, found.documents, found.not_scored) == (tokens, 40, 0)


def test_exits_are_counted():
    model, some = FakeModel(), documents(40)
    found = paired_perplexity(model, some)
    left = sum(slow_scores(model, d, 0.1)[3] for d in some)
    steps = sum(slow_scores(model, d, 0.1)[2] for d in some)
    assert found.exits_by_layer == {CHECKPOINT: left}
    assert found.exit_share == pytest.approx(left / steps)
    assert found.depth == LAYERS
    ran = (left * (CHECKPOINT + 1) + (steps - left) * LAYERS) / steps
    assert found.mean_depth == pytest.approx(ran)
    assert sum(row["exits"] for row in found.per_document) == left
    assert [row["hash"] for row in found.per_document] == [d.hash for d in some]


def test_other_thresholds_can_be_tried():
    model, some = FakeModel(threshold=0.1), documents(20)
    bold = paired_perplexity(model, some, cascade=policy(0.9).cascade)
    assert bold.sedac_ppl == pytest.approx(
        paired_perplexity(FakeModel(threshold=0.9), some).sedac_ppl
    )
    assert model.threshold == 0.1


def test_another_baseline_takes_the_place_of_the_base():
    model, other, some = FakeModel(threshold=0.3), FakeModel(), documents(20)
    other.table = model.table * 0.5
    found, own = (paired_perplexity(model, some, baseline=one) for one in (other, None))
    assert found.sedac_ppl == own.sedac_ppl
    assert found.base_ppl != pytest.approx(own.base_ppl, rel=0.01)
    assert found.base_ppl == paired_perplexity(other, some, exits=False).base_ppl
    assert found.ppl_increase == pytest.approx(found.sedac_ppl / found.base_ppl - 1)


def test_exits_that_change_nothing_have_an_interval_of_no_width():
    found = paired_perplexity(FakeModel(threshold=0.0), documents(20))
    assert found.ppl_increase == 0.0
    assert found.ppl_increase_ci95 == (0.0, 0.0)


def test_nan_under_exits_is_not_dropped():
    model = FakeModel()
    model.poison = {"simulate": 9}
    found = paired_perplexity(model, documents(40))
    assert found.sedac_ppl == math.inf
    assert found.ppl_increase == math.inf
    assert found.ppl_increase_ci95[1] == math.inf
    assert any(row["sedac_nll"] is None for row in found.per_document)


def test_documents_that_the_base_cannot_score_leave_both_sides():
    model, some = FakeModel(), documents(40)
    clean = [d for d in some if 9 not in d.ids[2:-1]]
    want = paired_perplexity(model, clean)
    model.poison = {"always": 9}
    found = paired_perplexity(model, some)
    assert found.not_scored == len(some) - len(clean) > 0
    assert found.base_ppl == pytest.approx(want.base_ppl)
    assert found.sedac_ppl == pytest.approx(want.sedac_ppl)
    assert len(found.per_document) == len(some)


def test_nothing_that_can_be_scored_is_refused():
    model = FakeModel()
    model.poison = {"always": 9}
    with pytest.raises(CalibrationError, match="none of 1 documents"):
        paired_perplexity(model, [Document(np.array([1, 9, 9, 2]), 1)])


def test_a_document_without_a_decode_step_counts_for_perplexity():
    found = paired_perplexity(FakeModel(), [Document(np.arange(8), 7)])
    assert found.tokens == 1
    assert found.ppl_increase == 0.0
    assert found.mean_depth == LAYERS
