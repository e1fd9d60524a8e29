"""Shift of domains: what counts as a difference, and domains that are and are not alike."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sedac_hf.calibration.documents import Document
from sedac_hf.errors import CalibrationError
from sedac_hf.testing import DistributionShiftTest, SuiteInput, TestConfig
from sedac_hf.testing.distribution_shift import ShiftOutcome, between_variance
from tests.artefacts import make_tokenizer
from tests.evaluation.wrapped import random_documents, wrapped_llama
from tests.micro_exits import PROMPT, micro_documents, set_share
from tests.micro_model import CHAIN_LENGTH, CHAINS, NAMES


def shift(model, data, tokenizer=None, **limits):
    given = SuiteInput(None, model, data, TestConfig(**limits), tokenizer=tokenizer)
    return DistributionShiftTest().run(given)


def one_kind(language, kind, count, seed):
    """Documents of the micro language that hold chains only, or looked-up pairs only."""
    rng, documents = np.random.default_rng(seed), []
    for _ in range(count):
        ids = [language.ids["<bos>"]]
        while len(ids) < 64:
            if kind == "chain":
                first = language.ids["k0a"] + int(rng.integers(CHAINS)) * CHAIN_LENGTH
                ids += range(first, first + CHAIN_LENGTH)
            else:
                one, two = (int(i) for i in rng.integers(NAMES, size=2))
                value = language.ids["v0"] + int(language.table[one, two])
                ids += [language.ids["n0"] + one, language.ids["n0"] + two, value]
        documents.append(Document(np.array(ids[:64]), PROMPT))
    return documents


def test_domains_of_one_language_are_alike(exits, micro_model):
    data = {str(seed): micro_documents(micro_model.language, 20, seed=seed) for seed in (5, 6, 7)}
    found = shift(exits, data)
    assert isinstance(found, ShiftOutcome)
    assert found.passed is True
    assert found.exit_variance < 0.05
    assert [one.name for one in found.domains] == ["5", "6", "7"]
    assert all(one.exit_rate > 0.15 for one in found.domains)


def test_domains_that_leave_at_different_rates_fail(exits, micro_model):
    data = {kind: one_kind(micro_model.language, kind, 20, 3) for kind in ("chain", "pair")}
    found = shift(exits, data)
    chain, pair = found.domains
    assert chain.exit_rate > 3 * pair.exit_rate
    assert found.passed is False
    assert found.exit_variance > 0.2
    rates = [chain.exit_rate, pair.exit_rate]
    assert found.raw_exit_variance == pytest.approx(np.var(rates, ddof=1))


def test_domains_that_exits_hurt_differently_fail(exits, micro_model, early_states):
    set_share(exits, early_states, 1.0)  # everything leaves everywhere, which hurts pairs only
    data = {kind: one_kind(micro_model.language, kind, 20, 3) for kind in ("chain", "pair")}
    found = shift(exits, data, ppl_tolerance=0.05)
    chain, pair = found.domains
    assert found.exit_variance == pytest.approx(0.0, abs=1e-6)
    assert pair.ppl_increase > chain.ppl_increase
    assert found.quality_variance > 0.2
    assert found.passed is False
    assert "rises most on pair" in found.notes[0]


def test_the_user_has_one_domain_and_the_package_adds_its_own():
    model, documents = wrapped_llama(), random_documents(6)
    limits = {"domain_documents": 3, "answer_tokens": 16}
    found = shift(model, documents, make_tokenizer(), **limits)
    assert [one.name for one in found.domains] == ["texts", "chat", "code", "grounded"]
    assert "answered by the baseline" in found.notes[0]
    assert all(one.documents >= 2 for one in found.domains)
    few = shift(model, documents, make_tokenizer(), shipped_domains=["code"], **limits)
    assert [one.name for one in few.domains] == ["texts", "code"]
    # no texts at all: the package's are all there is
    alone = SuiteInput(None, model, None, TestConfig(**limits), tokenizer=make_tokenizer())
    assert list(alone.given) == list(alone.domains()) == ["chat", "code", "grounded"]


def test_domains_that_cannot_be_compared_are_refused():
    model, documents = wrapped_llama(), random_documents(6)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        shift(model, documents)
    with pytest.raises(CalibrationError, match="at least two"):
        shift(model, documents, shipped_domains=())
    with pytest.raises(CalibrationError, match="'b' has 1 documents"):
        shift(model, {"a": documents, "b": documents[:1]})
    short = [Document(np.arange(3, 8), 4) for _ in range(3)]
    with pytest.raises(CalibrationError, match="0 decode steps"):
        shift(model, {"a": documents, "b": short})


def test_where_exits_are_not_final_it_is_skipped(exits, documents):
    assert shift(exits, documents, mode="plain").passed is None


def test_the_variance_between_domains_is_free_of_that_within():
    rng = np.random.default_rng(0)
    errors = np.array([0.1, 0.2, 0.3, 0.4])
    for spread in (0.0, 1.0):
        # without the floor at 0 the estimate is unbiased
        true = rng.normal(0.0, spread, (20_000, 4))
        values = true + errors * rng.normal(size=true.shape)
        raw = values.var(axis=1, ddof=1) - np.square(errors).mean()
        assert raw.mean() == pytest.approx(spread**2, abs=0.02)
        assert between_variance(values[0], errors) == pytest.approx(max(0.0, raw[0]))
    assert between_variance(np.array([0.1, math.inf]), np.array([0.1, math.nan])) == math.inf
    assert between_variance(np.array([0.3, 0.3]), np.zeros(2)) == 0.0
