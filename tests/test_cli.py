"""The `sedac` command: what it prints, what it returns, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from sedac_hf import __version__
from sedac_hf.cli import app
from sedac_hf.cli_support import Screen
from sedac_hf.errors import CalibrationError, FingerprintError
from sedac_hf.evaluation.report import load_report
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import issue, load_base, make_tokenizer, save_base, wrap_base

COMMANDS = ("demo", "fit", "eval", "bench", "test", "generate", "metrics", "info")
# What the runner returns is typed by whichever click typer brings along.
Result = Any
Runner = Callable[..., Result]


@pytest.fixture
def sedac() -> Runner:
    """Call the command in this process and check that no traceback ever shows."""

    def run(*arguments: object, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base with a tokenizer, on disk."""
    return save_base(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def artefact(base: Path) -> Path:
    """An artefact of that base whose tokens leave at three checkpoints."""
    folder = base.parent / "artefact"
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    model.save_pretrained(folder, tokenizer=make_tokenizer(), certificate=issue())
    return folder


@pytest.fixture(scope="module")
def texts(base: Path) -> Path:
    """Twelve documents with prompts, as JSON lines."""
    generator = torch.Generator().manual_seed(1)
    path = base.parent / "texts.jsonl"
    with path.open("w") as stream:
        for _ in range(12):
            ids = torch.randint(4, 60, (24,), generator=generator).tolist()
            words = [f"w{i}" for i in ids]
            record = {"prompt": " ".join(words[:6]), "completion": " ".join(words[6:])}
            stream.write(json.dumps(record) + "\n")
    return path


def parsed(result: Result) -> dict[str, Any]:
    """The one object on standard output."""
    values = json.loads(result.stdout)
    assert isinstance(values, dict)
    return values


# ------------------------------------------------------------------------------- help and errors


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from sedac_hf.cli import app\n"
        "try:\n    app(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(sedac: Runner, command: str) -> None:
    result = sedac(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "Example: sedac" in result.stdout


def test_version_and_module_agree(sedac: Runner) -> None:
    assert __version__ in sedac("--version").stdout
    module = [sys.executable, "-m", "sedac_hf", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout == (
        sedac("--version").stdout
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("generate",),
        ("generate", "no/such-folder/here", "hello"),
        ("eval", "no/such-folder/here"),
        ("info", "no/such-folder/here"),
        ("fit", "no/such-folder/here", "-o", "out"),
        ("fit", "base", "-o", "out", "--budget", "soon"),
        ("fit", "base", "-o", "out", "--budget", "0m"),
    ],
)
def test_what_cannot_be_done_ends_with_two(
    sedac: Runner, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sedac(*arguments).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_an_error_is_an_object_too_with_json(sedac: Runner, tmp_path: Path) -> None:
    result = sedac("generate", tmp_path / "missing", "hello", "--json")
    assert result.exit_code == 2
    error = parsed(result)["error"]
    assert error["type"] == "UsageError"
    assert "missing" in error["message"]
    assert "error: " in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(CalibrationError("too few"), 1), (FingerprintError("another"), 1), (OSError("full"), 1)],
)
def test_what_goes_wrong_ends_with_one(
    sedac: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("sedac_hf.cli_info.environment_info", fail)
    result = sedac("info")
    assert result.exit_code == code
    assert str(error) in result.stderr


def test_a_file_is_no_model_folder(sedac: Runner, texts: Path) -> None:
    result = sedac("info", texts)
    assert result.exit_code == 2
    assert "is a file" in result.stderr


def test_without_the_repository_the_demo_says_what_to_do(
    sedac: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sedac_hf.cli_support.BUNDLED", tmp_path / "nothing")
    for command in ("demo", "eval", "bench", "test"):
        result = sedac(command)
        assert result.exit_code == 2
        assert "sedac fit BASE" in result.stderr


# --------------------------------------------------------------------------------------- generate


def test_generate_writes_what_the_model_writes(sedac: Runner, artefact: Path) -> None:
    model = SedacForCausalLM.from_pretrained(artefact, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    inputs = tokenizer("w5 w9 w7", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(out[0, 3:], skip_special_tokens=True)
    result = sedac(
        "generate", artefact, "w5 w9 w7", "--max-new-tokens", 12, "--dtype", "float32", "-q"
    )
    assert result.exit_code == 0
    assert result.stdout.strip() == expected.strip()


def test_a_trace_accounts_for_every_token(sedac: Runner, artefact: Path) -> None:
    options = ("--max-new-tokens", 16, "--trace", "--json")
    values = parsed(sedac("generate", artefact, "w5 w9 w7", *options))
    tokens = values["tokens"]
    assert values["new_tokens"] == len(tokens) <= 16
    assert "".join(token["text"] for token in tokens) == values["text"]
    layers = [token["layer"] for token in tokens]
    depth = values["depth"]
    assert layers[0] == depth  # the prompt's own pass never leaves
    assert values["exit_share"] == sum(layer < depth for layer in layers) / len(layers) > 0
    exits = {str(layer): layers.count(layer) for layer in (0, 1, 2)}
    assert values["exits_by_layer"] == exits
    assert tokens[0]["risk"] is None
    assert all(token["risk"] >= 0 for token in tokens[1:])


def test_off_mode_generates_with_the_base_and_without_exits(sedac: Runner, artefact: Path) -> None:
    options = ("--max-new-tokens", 8, "--json", "--mode", "off")
    values = parsed(sedac("generate", artefact, "w5 w9 w7", *options))
    assert values["exit_share"] == 0
    assert values["mean_depth"] == values["depth"]
    assert "tokens" not in values


def test_a_prompt_may_come_from_standard_input(sedac: Runner, artefact: Path) -> None:
    options = ("--max-new-tokens", 6, "--json", "-q")
    piped = parsed(sedac("generate", artefact, *options, stdin="w5 w9 w7"))
    given = parsed(sedac("generate", artefact, "w5 w9 w7", *options))
    assert piped["text"] == given["text"]
    assert sedac("generate", artefact, *options, stdin=" \n").exit_code == 2


def test_sampling_follows_the_seed(sedac: Runner, artefact: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 1.5, "--max-new-tokens", 16, "--json", "--seed", seed)
        return str(parsed(sedac("generate", artefact, "w5 w9 w7", *options))["text"])

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1


def test_a_system_message_needs_a_chat_template(sedac: Runner, artefact: Path) -> None:
    result = sedac("generate", artefact, "w5", "--system", "w6")
    assert result.exit_code == 2
    assert "chat template" in result.stderr


def test_an_unknown_mode_names_those_that_exist(sedac: Runner, artefact: Path) -> None:
    result = sedac("generate", artefact, "w5", "--mode", "turbo")
    assert result.exit_code == 2
    assert "certified" in result.stderr


def test_a_base_elsewhere_is_found_by_base(sedac: Runner, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    model = wrap_base(load_base(base), base_model_name_or_path=str(tmp_path / "gone"))
    model.save_pretrained(folder, tokenizer=make_tokenizer(), certificate=issue())
    lost = sedac("generate", folder, "w5 w9")
    assert lost.exit_code == 2
    assert "--base" in lost.stderr
    found = sedac("generate", folder, "w5 w9", "--base", base, "--max-new-tokens", 2)
    assert found.exit_code == 0


# ------------------------------------------------------------------------------------------- eval


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


# ------------------------------------------------------------------------------------ demo, info


def test_the_demo_writes_twice_and_measures(sedac: Runner, artefact: Path) -> None:
    options = ("--max-new-tokens", 6, "--documents", 4)
    result = sedac("demo", artefact, *options)
    assert result.exit_code == 0
    assert result.stdout.count("> W") == 2
    assert result.stdout.count("■ layer 1: ") == 2
    assert "speed against base.generate()" in result.stdout
    values = parsed(sedac("demo", artefact, *options, "--json"))
    assert [answer["new_tokens"] <= 6 for answer in values["answers"]] == [True, True]
    assert values["evaluation"]["speed"]["rounds"] in (1, 2, 3)


def test_info_tells_what_an_artefact_holds(sedac: Runner, artefact: Path, base: Path) -> None:
    values = parsed(sedac("info", artefact, "--json"))
    assert values["kind"] == "artefact"
    assert values["base_found"] == str(base)
    assert [point["layer_idx"] for point in values["checkpoints"]] == [0, 1, 2]
    assert "260 documents" in values["certificate"]
    assert values["megabytes"] > 0
    assert "260 documents" in sedac("info", artefact).stdout.replace("\n", " ")


def test_info_tells_which_pass_serves_and_why_no_better_one(
    sedac: Runner, artefact: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (artefact, base):
        monkeypatch.delenv("SEDAC_PASS", raising=False)
        values = parsed(sedac("info", model, "--json"))
        assert (values["runs_on"], values["runs_on_reason"]) == ("native", None)
        monkeypatch.setenv("SEDAC_PASS", "modules")
        values = parsed(sedac("info", model, "--json"))
        assert values["runs_on"] == "modules"
        assert "SEDAC_PASS=modules" in values["runs_on_reason"]


def test_info_says_that_a_base_elsewhere_was_not_asked(
    sedac: Runner, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sedac_hf.cli_info.find_base", lambda *_: "someone/somewhere")
    values = parsed(sedac("info", artefact, "--json"))
    assert values["runs_on"] is None
    assert "not at hand" in values["runs_on_reason"]


def test_info_tells_a_plain_base_and_the_machine(sedac: Runner, base: Path) -> None:
    assert parsed(sedac("info", base, "--json"))["kind"].startswith("plain base")
    here = parsed(sedac("info", "--json"))
    assert here["versions"]["sedac_hf"] == __version__
    assert here["machine"]["cores"] >= 1


def test_a_damaged_artefact_is_named(sedac: Runner, artefact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in artefact.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "sedac.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    for command in (("info", broken), ("generate", broken, "w5")):
        result = sedac(*command)
        assert result.exit_code == 1
        assert "sedac.safetensors" in result.stderr.replace("\n", "")


def test_quiet_is_quiet(sedac: Runner, artefact: Path) -> None:
    assert sedac("generate", artefact, "w5 w9", "--max-new-tokens", 3, "--quiet").stderr == ""
    screen = Screen(quiet=True)
    assert not screen.progress
