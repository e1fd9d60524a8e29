"""`sedac eval`: one object or one table, and what it says where exits are not certified."""

from __future__ import annotations

from pathlib import Path

import pytest

from sedac_hf.evaluation.report import load_report
from tests.artefacts import issue, load_base, make_tokenizer, wrap_base
from tests.cli_command import Runner, artefact, base, parsed, sedac, texts

__all__ = ["artefact", "base", "sedac", "texts"]


def test_eval_prints_one_object_with_all_figures(
    sedac: Runner, artefact: Path, texts: Path, tmp_path: Path
) -> None:
    where = tmp_path / "results.json"
    options = ("--rounds", 1, "--prompts", 2, "--max-new-tokens", 4, "-o", where, "--json")
    values = parsed(sedac("eval", artefact, "--data", texts, *options))
    needed = {
        "base_ppl", "sedac_ppl", "ppl_increase", "ppl_increase_ci95", "exit_share",
        "exits_by_layer", "mean_depth", "depth", "speed_vs_generate", "speed_vs_plain",
        "head_share", "certificate", "conditions", "texts",
    }  # fmt: skip
    assert needed <= values.keys()
    rise = values["sedac_ppl"] / values["base_ppl"] - 1
    assert values["ppl_increase"] == pytest.approx(rise, rel=1e-6)
    low, high = values["ppl_increase_ci95"]
    assert low <= values["ppl_increase"] <= high
    assert 0 < values["exit_share"] <= 1
    assert values["mean_depth"] < values["depth"]
    assert values["speed_vs_generate"] > 0
    assert values["documents"] == 12
    assert values["certified"] is True
    stored = load_report(where)
    assert stored["base_ppl"] == values["base_ppl"]


def test_eval_prints_one_table(sedac: Runner, artefact: Path, texts: Path) -> None:
    result = sedac("eval", artefact, "--data", texts, "--no-speed", "--documents", 4)
    assert result.exit_code == 0
    for words in ("perplexity (4 documents", "95 % interval", "layers per token", "after layer 1"):
        assert words in result.stdout
    assert "Conditions: " in result.stdout
    assert "tokens per second" not in result.stdout


def test_eval_fails_where_perplexity_rises_too_much(
    sedac: Runner, artefact: Path, texts: Path
) -> None:
    common = ("eval", artefact, "--data", texts, "--no-speed", "--json")
    rise = parsed(sedac(*common))["ppl_increase"]
    assert sedac(*common, "--max-increase", rise + 0.01).exit_code == 0
    failed = sedac(*common, "--max-increase", rise - 0.01)
    assert failed.exit_code == 1
    assert parsed(failed)["ppl_increase"] == rise


def test_eval_without_certificate_measures_the_base_and_says_so(
    sedac: Runner, base: Path, texts: Path, tmp_path: Path
) -> None:
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    model.save_pretrained(tmp_path / "artefact", tokenizer=make_tokenizer())
    result = sedac("eval", tmp_path / "artefact", "--data", texts, "--no-speed", "--json")
    assert result.exit_code == 0
    assert parsed(result)["ppl_increase"] == 0
    assert parsed(result)["exit_share"] == 0
    assert "exits stay off in certified mode" in result.stderr


def test_thresholds_without_certificate_act_only_when_asked(
    sedac: Runner, base: Path, texts: Path, tmp_path: Path
) -> None:
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    untested, refused = tmp_path / "untested", tmp_path / "refused"
    model.save_pretrained(untested, tokenizer=make_tokenizer())
    certificate = issue(passes=False)
    model.set_cascade(None)
    model.save_pretrained(refused, tokenizer=make_tokenizer(), certificate=certificate)
    for folder in (untested, refused):
        options = ("--max-new-tokens", 12, "--json")
        silent = parsed(sedac("generate", folder, "w5 w9 w7", *options))
        assert silent["exit_share"] == 0
        asked = sedac("generate", folder, "w5 w9 w7", *options, "--uncertified")
        assert parsed(asked)["exit_share"] > 0
        assert "NOT CERTIFIED" in asked.stderr
        options = ("--data", texts, "--no-speed", "--uncertified")
        assert "(not certified)" in sedac("eval", folder, *options).stdout
        assert parsed(sedac("eval", folder, *options, "--json"))["certified"] is False
    shown = sedac("demo", refused, "--max-new-tokens", 6, "--documents", 4)
    assert "NOT CERTIFIED" in shown.stdout


def test_eval_of_a_plain_base_says_to_fit_one(sedac: Runner, base: Path, texts: Path) -> None:
    result = sedac("eval", base, "--data", texts)
    assert result.exit_code == 2
    assert "sedac fit" in result.stderr


def test_eval_without_data_lets_the_base_write(sedac: Runner, artefact: Path) -> None:
    values = parsed(sedac("eval", artefact, "--no-speed", "--documents", 6, "--json", "-q"))
    assert values["documents"] == 6
    assert "base wrote" in values["texts"]


def test_a_report_into_a_missing_folder_is_refused_before_work(
    sedac: Runner, artefact: Path, tmp_path: Path
) -> None:
    result = sedac("eval", artefact, "-o", tmp_path / "no" / "results.json")
    assert result.exit_code == 2
    assert "folder does not exist" in result.stderr
