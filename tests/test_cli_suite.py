"""`sedac test`: what it prints, its exit codes, and how it says no."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf.evaluation.perplexity import paired_perplexity
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import issue, make_tokenizer, save_base
from tests.cli_command import call as sedac
from tests.micro_exits import fitted_states, micro_documents, micro_exits, set_share
from tests.micro_model import MicroModel

NAMES = ["quality", "robustness", "performance", "distribution_shift"]
QUICK = ("--rounds", 1, "--prompts", 2, "--max-new-tokens", 4, "--slo-ms", 60_000)


@pytest.fixture(scope="module")
def folder(micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good artefact, one whose thresholds wreck quality, and texts of two domains."""
    folder = tmp_path_factory.mktemp("suite")
    base = micro_model.save(folder / "base")
    good = micro_exits(micro_model, base_model_name_or_path=str(base))
    spoilt = copy.deepcopy(good)
    ids = torch.tensor([d.ids for d in micro_model.language.documents(40, seed=5)])
    set_share(spoilt, fitted_states(spoilt, ids)[0], 0.95)
    for name, model in (("good", good), ("spoilt", spoilt)):
        certificate = issue(model.cascade, kv_mode=model.config.kv_mode)
        model.save_pretrained(
            folder / name, tokenizer=micro_model.tokenizer, certificate=certificate
        )
    for seed, domain in ((90, "one"), (91, "two")):
        documents = micro_model.language.documents(12, seed=seed)
        lines = [json.dumps({"text": micro_model.language.text(one)}) for one in documents]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    return folder


def both(folder: Path) -> tuple[object, ...]:
    return ("--data", folder / "one.jsonl", "--data", folder / "two.jsonl")


def test_a_good_artefact_passes_and_the_report_says_so(folder: Path) -> None:
    result = sedac("test", folder / "good", *both(folder), *QUICK)
    assert result.exit_code == 0, result.output
    for words in (*NAMES, "4 passed", "certified mode; documents: one (12), two (12)"):
        assert words in result.stdout
    assert "Conditions: float32" in result.stdout or "Conditions: bfloat16" in result.stdout


def test_a_spoilt_artefact_fails_and_the_object_says_why(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "report.json"
    options = (*QUICK, "--only", "quality, performance", "-o", where, "--dtype", "float32")
    result = sedac("test", folder / "spoilt", *both(folder), *options, "--json", "-q")
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert values["passed"] is False
    assert list(values["tests"]) == ["quality", "performance"]
    assert values["tests"]["quality"]["verdict"] == "failed"
    assert values["tests"]["performance"]["verdict"] == "passed"
    assert values["domains"] == {"one": 12, "two": 12}
    assert json.loads(where.read_text())["tests"] == values["tests"]
    model: Any = SedacForCausalLM.from_pretrained(folder / "spoilt", dtype=torch.float32)
    assert values["conditions"]["model"]["thresholds"][0]["threshold"] == pytest.approx(
        model.cascade.layers[0].threshold
    )


@pytest.mark.parametrize(
    "limit", [("--slo-ms", 1e-6), ("--ppl-tolerance", 1e-9), ("--min-consistency", 0.99999)]
)
def test_a_limit_that_is_missed_ends_with_one(folder: Path, limit: tuple[object, ...]) -> None:
    tests = {"--slo-ms": "performance", "--ppl-tolerance": "quality"}
    only = tests.get(str(limit[0]), "robustness")
    options = (*QUICK, *limit, "--only", only, "--json", "-q")
    result = sedac("test", folder / "good", *both(folder), *options)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["tests"][only]["verdict"] == "failed"


def test_one_domain_is_joined_by_those_of_the_package(folder: Path) -> None:
    options = ("--only", "distribution_shift", "--json", "-q", "--documents", 6)
    result = sedac("test", folder / "good", "--data", folder / "one.jsonl", *options)
    found = json.loads(result.stdout)["tests"]["distribution_shift"]
    assert [one["name"] for one in found["domains"]] == ["one", "chat", "code", "grounded"]
    assert found["domains"][0]["documents"] == 6


def test_it_measures_what_the_evaluation_measures(folder: Path, micro_model: MicroModel) -> None:
    options = ("--only", "quality", "--json", "-q", "--dtype", "float32", "--documents", 12)
    result = sedac("test", folder / "good", "--data", folder / "one.jsonl", *options)
    options = ("--no-speed", "--json", "-q", "--dtype", "float32")
    evaluated = sedac("eval", folder / "good", "--data", folder / "one.jsonl", *options)
    found = json.loads(result.stdout)["tests"]["quality"]["ppl_increase"]
    assert found == json.loads(evaluated.stdout)["ppl_increase"]
    model: Any = SedacForCausalLM.from_pretrained(folder / "good", dtype=torch.float32)
    other = paired_perplexity(model, micro_documents(micro_model.language, 12, seed=92))
    assert found != other.ppl_increase


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "gone.jsonl"), "no such file"),
        (("--only", "speed"), "expected some of quality"),
        (("--only", ","), "found none"),
        (("--slo-ms", "0"), "latency_slo_ms must be"),
        (("--max-new-tokens", "1"), "max_new_tokens must be at least 2"),
        (("--mode", "turbo"), "certified"),
        (("-o", "no/such/folder/report.json"), "folder does not exist"),
    ],
)
def test_what_cannot_be_done_ends_with_two(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    result = sedac("test", folder / "good", *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_two_domains_of_one_name_are_refused(folder: Path) -> None:
    result = sedac("test", folder / "good", *("--data", folder / "one.jsonl") * 2)
    assert result.exit_code == 2
    assert "one stands there twice" in result.stderr


def test_a_plain_base_has_nothing_to_test(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    make_tokenizer().save_pretrained(base)
    result = sedac("test", base)
    assert result.exit_code == 2
    assert "sedac fit" in result.stderr
