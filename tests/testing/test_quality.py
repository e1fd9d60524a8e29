"""Quality: perplexity against the baseline's; greedy texts where exits are not final."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from sedac_hf.errors import ConfigError
from sedac_hf.evaluation.perplexity import paired_perplexity
from sedac_hf.testing import QualityTest, SuiteInput, TestConfig
from sedac_hf.testing.quality import AgreementOutcome, QualityOutcome
from tests.micro_exits import set_share
from tests.tiny_models import build_tiny


def quality(baseline, model, documents, **limits):
    return QualityTest().run(SuiteInput(baseline, model, documents, TestConfig(**limits)))


def disturbed(base):
    """The base with every weight off by about half."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1 + 0.5 * torch.randn_like(parameter)
    return other


def test_a_good_model_passes_with_the_figures_of_the_evaluation(exits, documents):
    found = quality(exits.base_lm, exits, documents)
    assert isinstance(found, QualityOutcome)
    assert found.passed is True
    assert found.exit_share > 0.2
    want = paired_perplexity(exits, documents)
    assert found.ppl_increase == want.ppl_increase
    assert found.interval == want.ppl_increase_ci95
    assert (found.base_ppl, found.sedac_ppl) == (want.base_ppl, want.sedac_ppl)


def test_thresholds_that_wreck_quality_fail(exits, documents, early_states):
    set_share(exits, early_states, 0.95)
    found = quality(exits.base_lm, exits, documents)
    assert found.passed is False
    assert found.ppl_increase > 0.2
    assert "below 1.00%" in found.criterion


def test_exits_that_say_nan_fail(exits, documents):
    with torch.no_grad():
        exits.exit_heads[0].up.bias.fill_(math.nan)
        exits.set_cascade(replace(exits.cascade, layers=[
            replace(exits.cascade.layers[0], min_probability=0.0)]))  # fmt: skip
    found = quality(exits.base_lm, exits, documents)
    assert found.passed is False
    assert found.to_dict()["sedac_ppl"] is None


def test_the_upper_end_may_be_judged_in_place_of_the_estimate(exits, documents):
    found = quality(exits.base_lm, exits, documents)
    low, high = found.interval
    assert low < found.ppl_increase < high
    between = (found.ppl_increase + high) / 2
    estimate = quality(exits.base_lm, exits, documents, ppl_tolerance=between)
    assert estimate.passed is True
    assert "too few to tell" in estimate.notes[0]
    upper = quality(exits.base_lm, exits, documents, ppl_tolerance=between, judge_upper_end=True)
    assert upper.passed is False


def test_a_baseline_of_its_own_is_what_counts(exits, documents):
    own = quality(None, exits, documents)
    same = quality(copy.deepcopy(exits.base_lm), exits, documents)
    assert same.base_ppl == pytest.approx(own.base_ppl, rel=1e-6)
    assert same.ppl_increase == pytest.approx(own.ppl_increase, abs=1e-6)
    worse = quality(disturbed(exits.base_lm), exits, documents)
    assert worse.base_ppl > 1.2 * own.base_ppl
    assert worse.sedac_ppl == pytest.approx(own.sedac_ppl)
    assert worse.ppl_increase < 0


def test_a_baseline_with_other_words_is_refused(exits, documents):
    with pytest.raises(ConfigError, match=r"96 tokens .* 66"):
        quality(build_tiny("llama"), exits, documents)


def test_exact_mode_writes_what_the_baseline_writes(exits, documents):
    found = quality(exits.base_lm, exits, documents, mode="exact", prompts=6, max_new_tokens=24)
    assert isinstance(found, AgreementOutcome)
    assert found.passed is True
    assert found.texts == 6
    assert "not final in exact mode" in found.notes[0]


def test_exact_mode_over_other_weights_fails(exits, documents):
    other = disturbed(exits.base_lm)
    found = quality(other, exits, documents, mode="exact", prompts=6, max_new_tokens=24)
    assert found.passed is False
    assert found.equal < 1
    assert found.largest_units > 16
