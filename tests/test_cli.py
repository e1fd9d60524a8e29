"""The `sedac` command: what it prints, what it returns, and how it says no."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sedac_hf import __version__
from sedac_hf.cli_support import Screen
from sedac_hf.errors import CalibrationError, FingerprintError
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import issue, load_base, make_tokenizer, wrap_base
from tests.cli_command import Runner, artefact, base, parsed, sedac, texts

COMMANDS = ("demo", "fit", "eval", "bench", "test", "generate", "metrics", "info")

__all__ = ["artefact", "base", "sedac", "texts"]


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
