"""The suite: the names of the first description, results, tests of one's own, bad arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sedac_hf.errors import CalibrationError, ConfigError, ModeError
from sedac_hf.evaluation import perplexity as perplexity_module
from sedac_hf.modeling import SedacForCausalLM
from sedac_hf.testing import (
    ComprehensiveTestSuite,
    SuiteInput,
    TestConfig,
    TestOutcome,
    suite_input,
)
from tests.artefacts import make_tokenizer
from tests.evaluation.wrapped import random_documents, wrapped_llama
from tests.micro_exits import set_share
from tests.tiny_models import build_tiny

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"rounds": 1, "prompts": 2, "max_new_tokens": 3, "latency_slo_ms": 60_000.0}
NAMES = ["quality", "robustness", "performance", "distribution_shift"]


class Named:
    """A test of one's own that says what it was told to."""

    def __init__(self, name="mine", passed=True, error=None):
        self.name, self._passed, self._error = name, passed, error

    def run(self, given: SuiteInput) -> TestOutcome:
        if self._error:
            raise self._error
        return TestOutcome(name=self.name, passed=self._passed, criterion="c", found="f")


def test_the_first_description_works_as_written(exits, micro_model, documents, capsys):
    baseline_model, sedac_model = micro_model.model, exits
    test_data = {"one": documents[:20], "two": documents[20:]}
    suite = ComprehensiveTestSuite(config=TestConfig(ppl_tolerance=0.01, latency_slo_ms=60_000))
    suite.add_default_tests()
    results = suite.run_all(baseline_model, sedac_model, test_data)
    suite.print_report(results)
    assert [one.name for one in results] == NAMES
    assert results.passed
    assert results.domains == {"one": 20, "two": 20}
    printed = capsys.readouterr().out
    for words in (*NAMES, "certified mode", "4 passed", "noise of 1.00%", "one (20 documents)"):
        assert words in printed


def test_one_failure_fails_the_suite_and_all_of_it_is_json(
    exits, micro_model, documents, early_states
):
    set_share(exits, early_states, 0.95)
    suite = ComprehensiveTestSuite(TestConfig(**QUICK)).add_default_tests()
    results = suite.run_all(micro_model.model, exits, {"a": documents[:20], "b": documents[20:]})
    assert results["quality"].passed is False
    assert results["performance"].passed is True
    assert not results.passed
    values = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert values["tests"]["quality"]["verdict"] == "failed"
    assert values["tests"]["performance"]["sedac"]["p99"] > 0
    assert values["conditions"]["tests"]["ppl_tolerance"] == 0.01
    assert values["conditions"]["model"]["checkpoints"][0]["layer_idx"] == 1


def test_texts_become_documents_with_the_artefacts_own_tokenizer(tmp_path):
    base = build_tiny("llama")
    make_tokenizer().save_pretrained(tmp_path)
    base.config._name_or_path = str(tmp_path)
    model = wrapped_llama()
    model.base_lm.config._name_or_path = str(tmp_path)
    texts = ["w5 w6 w7 w8 w9 w10", "w11 w12 w13 w14"]
    suite = ComprehensiveTestSuite(TestConfig(**QUICK)).add_test(Named())
    assert suite.run_all(None, model, texts).domains == {"texts": 2}
    model.base_lm.config._name_or_path = ""
    with pytest.raises(CalibrationError, match="no tokenizer"):
        suite.run_all(None, model, texts)
    suite = ComprehensiveTestSuite(tokenizer=make_tokenizer()).add_test(Named())
    assert suite.run_all(None, model, {"x": texts}).domains == {"x": 2}


def test_tests_of_ones_own_count_as_the_others_do():
    def passed(*outcomes):
        suite = ComprehensiveTestSuite()
        for at, value in enumerate(outcomes):
            suite.add_test(Named(str(at), value))
        return suite.run_all(None, wrapped_llama(), random_documents(3)).passed

    assert passed(True)
    assert passed(True, None)
    assert not passed(True, False)
    assert not passed(None)  # nothing was tested


def test_a_test_that_cannot_run_failed_and_the_others_still_run():
    suite = ComprehensiveTestSuite()
    suite.add_test(Named("lost", error=CalibrationError("too few"))).add_test(Named())
    results = suite.run_all(None, wrapped_llama(), random_documents(3))
    assert results["lost"].passed is False
    assert results["lost"].found == "too few"
    assert results["mine"].passed is True
    with pytest.raises(KeyError, match="other"):
        results["other"]
    broken = ComprehensiveTestSuite().add_test(Named(error=ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a mistake in a test is no verdict
        broken.run_all(None, wrapped_llama(), random_documents(3))


def test_documents_are_scored_once_for_all_tests(exits, documents, monkeypatch):
    scored = []

    def counted(model, some, **options):
        scored.extend(d.hash for d in some)
        return perplexity_module.paired_perplexity(model, some, **options)

    monkeypatch.setattr(suite_input, "paired_perplexity", counted)
    suite = ComprehensiveTestSuite(TestConfig(**QUICK)).add_default_tests()
    suite.run_all(None, exits, {"a": documents[:10], "b": documents[10:20]})
    assert sorted(scored) == sorted(d.hash for d in documents[:20])


def test_the_models_are_left_as_they_were(exits, micro_model, documents):
    before = {name: value.clone() for name, value in exits.state_dict().items()}
    cascade, mode, tokens = exits.cascade, exits.config.mode, exits.exit_stats.tokens
    # Transformers itself may have left idle hooks behind.
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in exits.modules()]
    suite = ComprehensiveTestSuite(TestConfig(**QUICK)).add_default_tests()
    suite.run_all(micro_model.model, exits, {"a": documents[:4], "b": documents[4:8]})
    assert all(torch.equal(value, before[name]) for name, value in exits.state_dict().items())
    assert (exits.cascade, exits.config.mode, exits.exit_stats.tokens) == (cascade, mode, tokens)
    now = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in exits.modules()]
    assert now == hooks


def test_the_mode_is_certified_unless_another_is_named(exits, documents):
    suite = ComprehensiveTestSuite(TestConfig(mode="exact")).add_test(Named())
    assert suite.run_all(None, exits, documents).mode == "exact"
    exits.config.mode = "exact"
    suite = ComprehensiveTestSuite().add_test(Named())
    assert suite.run_all(None, exits, documents).mode == "certified"
    exits.refused_modes = {"certified": "another base"}
    assert suite.run_all(None, exits, documents).mode == "exact"
    suite = ComprehensiveTestSuite(TestConfig(mode="certified")).add_test(Named())
    with pytest.raises(ModeError, match="another base"):
        suite.run_all(None, exits, documents)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("one text", "found one string"),
        ({"a": "one text"}, "found one string"),
        ({"a": [1, 2]}, "'int'"),
        ({}, "no domain"),
    ],
)
def test_data_of_another_form_is_refused(data, words):
    suite = ComprehensiveTestSuite().add_test(Named())
    with pytest.raises(ConfigError, match=words):
        suite.run_all(None, wrapped_llama(), data)


def test_models_without_exits_and_suites_without_tests_are_refused():
    model, documents = wrapped_llama(), random_documents(3)
    with pytest.raises(ConfigError, match="add_default_tests"):
        ComprehensiveTestSuite().run_all(None, model, documents)
    suite = ComprehensiveTestSuite().add_test(Named())
    for other in (model.base_lm, SedacForCausalLM.from_base(build_tiny("llama"))):
        with pytest.raises(ConfigError, match="with checkpoints"):
            suite.run_all(None, other, documents)
    with pytest.raises(ConfigError, match="'mine' already"):
        suite.add_test(Named())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ppl_tolerance", 0.0),
        ("ppl_tolerance", float("nan")),
        ("latency_slo_ms", -1.0),
        ("min_consistency", 1.0),
        ("noise_levels", ()),
        ("noise_levels", (0.1, 0.0)),
        ("max_variance", float("inf")),
        ("max_new_tokens", 1),
        ("rounds", 0),
        ("prompts", 0),
        ("tie_units", float("nan")),
        ("min_speed_ratio", 0.0),
        ("shipped_domains", ("poems",)),
        ("domain_documents", 1),
        ("answer_tokens", 7),
    ],
)
def test_limits_that_cannot_be_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        TestConfig(**{field: value})


def test_an_unknown_mode_is_refused():
    with pytest.raises(ModeError, match="certified"):
        TestConfig(mode="turbo")


def test_pytest_collects_none_of_the_names(tmp_path):
    """A user's test file may import all of them."""
    path = tmp_path / "test_mine.py"
    path.write_text("from sedac_hf.testing import *\n\n\ndef test_one():\n    assert TestConfig\n")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    options = ("-W", "error::pytest.PytestCollectionWarning", str(path), "--rootdir", tmp_path)
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_importing_the_names_loads_no_torch():
    code = "import sys, sedac_hf.testing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
