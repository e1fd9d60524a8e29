"""`sedac bench`: what it prints, what it keeps, and how it says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf import cli_bench
from sedac_hf.cli_bench import plan_of
from sedac_hf.cli_support import REPOSITORY, UsageError
from sedac_hf.evaluation.bench_plan import BenchPlan
from tests.artefacts import issue
from tests.cli_command import Runner, call, sedac
from tests.micro_model import MicroModel
from tests.wrapping import rule, wrap

__all__ = ["sedac"]

RULES = [rule(1), rule(3)]
SMALL = ("--tokens", 4, "--prompts", 2, "--repeats", 1, "--groups", "chat", "--batches", "2")
RATIOS = ("vs_generate", "vs_plain", "vs_assistant_early_exit", "vs_prompt_lookup", "loop_gain")


@pytest.fixture(scope="module")
def artefact(micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of the micro model whose thresholds nothing covers."""
    folder = tmp_path_factory.mktemp("bench")
    base = micro_model.save(folder / "base")
    model = wrap(
        micro_model.model, {1: "lens", 3: "lens"}, RULES, base_model_name_or_path=str(base)
    )
    # The prompts are English, of which this model knows no word: its own language instead.
    model.save_pretrained(
        folder / "micro-sedac", tokenizer=micro_model.tokenizer, certificate=issue(passes=False)
    )
    return folder / "micro-sedac"


@pytest.fixture(autouse=True)
def micro_prompts(micro_model: MicroModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that the micro model can read; English words are all the same to it."""
    language = micro_model.language
    texts = [language.text(document) for document in language.documents(8, seed=4, length=12)]
    monkeypatch.setattr(cli_bench, "load_prompts", lambda group: texts)


@pytest.fixture(scope="module")
def report(artefact: Path, micro_model: MicroModel, tmp_path_factory: Any) -> dict[str, Any]:
    """One object for groups and batches, exits acting, with where it was kept."""
    folder = tmp_path_factory.mktemp("results")
    language = micro_model.language
    texts = [language.text(document) for document in language.documents(8, seed=4, length=12)]
    options = ("--tokens", "5", "--prompts", "4", "--repeats", "1", "--dtype", "float32")
    where = ("--batches", "1,4", "--groups", "chat,grounded", "-o", str(folder), "--threads", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_bench, "load_prompts", lambda group: texts)
        result = call("bench", artefact, *options, *where, "--uncertified", "--json")
    assert result.exit_code == 0, result.output
    (kept,) = folder.iterdir()
    return {"printed": json.loads(result.stdout), "kept": json.loads(kept.read_text())}


def test_one_object_is_printed_and_the_same_is_kept(report: dict[str, Any]) -> None:
    assert report["printed"] == report["kept"]
    assert set(report["printed"]) == {"conditions", "rows"}


def test_there_is_a_row_for_each_mode_group_and_batch_with_all_figures(
    report: dict[str, Any],
) -> None:
    rows = report["printed"]["rows"]
    named = [(row["batch"], row["group"], row["mode"]) for row in rows]
    modes = ("exact", "certified", "plain", "off", "exact (modules)", "plain (modules)")
    assert named == [(b, g, m) for b in (1, 4) for g in ("chat", "grounded") for m in modes]
    needed = {
        "acceptance", "tokens_per_tail_pass", "head_share", "token_equal", "token_checked",
        "divergence_gap", "divergence_units", "notes", "prompts", "runs_on", "vs_modules",
        *RATIOS, *(f"{name}_ci95" for name in RATIOS),
    }  # fmt: skip
    for row in rows:
        assert needed <= row.keys()
        assert row["prompts"] == 4
        assert 0 < row["head_share"] < 1
        for name in RATIOS:
            rival = name in ("vs_assistant_early_exit", "vs_prompt_lookup")
            assert (row[name] is None) == (rival and row["batch"] > 1)
            assert row[name] is None or row[name] > 0


def test_tokens_are_the_bases_where_that_is_promised(report: dict[str, Any]) -> None:
    for row in report["printed"]["rows"]:
        if row["mode"] == "certified":
            assert row["exit_share"] > 0
            assert row["tokens_per_tail_pass"] > 1
        else:
            assert row["token_equal"] is True
            assert (row["divergence_gap"], row["token_checked"]) == (0.0, 4)


def test_conditions_name_no_folder_of_this_machine(report: dict[str, Any], artefact: Path) -> None:
    found = report["printed"]["conditions"]
    assert found["model"] == "micro-sedac"
    assert found["threads"] == 1
    assert str(artefact.parent) not in json.dumps({**found, "config": None})
    search = found["assistant_early_exit"]
    assert str(search["layer"]) in search["seconds_per_token"]


def test_tables_show_gains_apart_and_what_was_left_out(
    sedac: Runner, artefact: Path, tmp_path: Path
) -> None:
    result = sedac("bench", artefact, *SMALL, "--modes", "plain,certified", "-o", tmp_path)
    assert result.exit_code == 0
    for words in ("loop", "exit", "vs base's", "plain (modules)", "gain", "certified",
                  "Conditions: micro-sedac in ",
                  "batch 1 only", "left out: llama.cpp", "exits are off", "drafts"):  # fmt: skip
        assert words in result.stdout
    assert "vs early" not in result.stdout  # a rival that was never timed has no column
    assert "kept as" in result.stderr


def test_a_quick_run_says_what_it_leaves_out(sedac: Runner, artefact: Path, tmp_path: Path) -> None:
    options = ("--quick", "--tokens", 2, "--groups", "code", "--batches", 1, "--modes", "off")
    result = sedac("bench", artefact, *options, "--json", "-o", tmp_path, "-q")
    found = json.loads(result.stdout)["conditions"]
    assert found["plan"]["quick"] is True
    assert (found["plan"]["tokens"], found["plan"]["prompts"]) == (2, 4)
    assert found["plan"]["seconds"] < 600
    assert result.stderr == ""


def test_a_bfloat16_run_is_checked_in_float32(
    sedac: Runner, artefact: Path, tmp_path: Path
) -> None:
    options = (*SMALL, "--modes", "plain", "--dtype", "bfloat16", "--json", "-o", tmp_path)
    values = json.loads(sedac("bench", artefact, *options).stdout)
    assert [row["mode"] for row in values["rows"]] == ["plain", "plain (modules)"]
    assert values["conditions"]["dtype"] == "bfloat16"
    for row in values["rows"]:
        assert row["token_equal"] is True
        assert row["token_checked"] == 2


def test_threads_and_logging_are_as_before(sedac: Runner, artefact: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    options = (*SMALL, "--modes", "off", "--threads", before + 1, "--json", "-o", tmp_path)
    values = json.loads(sedac("bench", artefact, *options).stdout)
    assert values["conditions"]["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--modes", "turbo"), "certified"),
        (("--groups", "poems"), "grounded"),
        (("--batches", "1,x"), "1,4,8"),
        (("--batches", "0"), "at least 1"),
        (("--gguf", "gone.gguf"), "no GGUF file"),
    ],
)
def test_what_cannot_be_measured_ends_with_two_and_keeps_nothing(
    sedac: Runner, artefact: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    result = sedac("bench", artefact, *SMALL, *options, "-o", tmp_path / "results")
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_for_results(sedac: Runner, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = sedac("bench", artefact, "-o", tmp_path / "file")
    assert result.exit_code == 2
    assert "name a folder" in result.stderr


def test_options_stand_above_quick_sizes() -> None:
    names = ("groups", "batches", "modes", "tokens", "prompts", "repeats")
    nothing: dict[str, Any] = dict.fromkeys(names)
    assert plan_of(quick=False, seed=0, **nothing) == BenchPlan()
    plan = plan_of(quick=True, seed=3, **{**nothing, "tokens": 7, "batches": "4, 1"})
    assert (plan.tokens, plan.batches, plan.seed, plan.quick) == (7, (4, 1), 3, True)
    with pytest.raises(UsageError):
        plan_of(quick=False, seed=0, **{**nothing, "batches": "many"})


def test_make_bench_measures_the_core_and_then_the_bundled_artefact() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    lines = text.split("\nbench:")[1].split("\n\n")[0].splitlines()
    assert "bench --manifest-path" in lines[1]
    assert "sedac_hf bench --quick" in lines[2]


def test_passes_are_timed_beside_torch(sedac: Runner, artefact: Path, tmp_path: Path) -> None:
    options = ("--pass", "--repeats", 1, "--dtype", "bfloat16", "-o", tmp_path / "kept")
    values = json.loads(sedac("bench", artefact, *options, "--json").stdout)
    assert [(p["context"], p["nodes"]) for p in values["passes"]] == [
        (128, nodes) for nodes in (1, 2, 4, 8, 16)
    ]
    assert all(p["native_ms"] > 0 < p["torch_ms"] for p in values["passes"])
    assert all(p["bandwidth_share"] > 0 for p in values["passes"])
    assert values["dtype"] == "bfloat16"
    table = sedac("bench", artefact, *options).stdout
    assert "torch" in table
    assert values["kernel"] in table
    steps = [each for each in values["outside_core"] if each["streamed"]]
    shares = {each["mode"]: each["share"] for each in steps}
    assert {"plain", "exact"} <= set(shares)
    assert all(0 < share < 1 for share in shares.values())
    assert "outside the core, plain:" in table
    assert "outside the core, plain, streamed:" in table
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("other", [("--modes", "plain"), ("--quick",), ("--tokens", 4)])
def test_passes_go_with_no_option_of_modes(
    sedac: Runner, artefact: Path, other: tuple[object, ...]
) -> None:
    result = sedac("bench", artefact, "--pass", *other)
    assert result.exit_code == 2
    assert "--pass goes with" in result.stderr
