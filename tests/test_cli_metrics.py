"""`sedac metrics`: answers prompts and is scraped meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner

from sedac_hf.cli import app
from sedac_hf.cli_metrics import prompts_of
from sedac_hf.cli_support import UsageError
from tests.artefacts import issue, load_base, make_tokenizer, save_base, wrap_base
from tests.metrics.scraping import scraped

TOKENS = 6


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact whose tokens leave at three checkpoints, and its base."""
    base = save_base(tmp_path_factory.mktemp("metrics") / "base")
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    model.save_pretrained(base.parent / "artefact", tokenizer=make_tokenizer(), certificate=issue())
    return base.parent / "artefact"


def arguments(artefact: Path, *more: object) -> list[str]:
    settings = ("--port", 0, "--dtype", "float32", "--max-new-tokens", TOKENS)
    return ["metrics", *(str(one) for one in (artefact, *settings, *more))]


@contextmanager
def started(artefact: Path, *more: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the address that it names."""
    command = [sys.executable, "-m", "sedac_hf", *arguments(artefact, *more)]
    pipe = subprocess.PIPE
    # What a shell runs in the background ignores SIGINT, and so would its children.
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("metrics: "):
                    yield process, line.removeprefix("metrics: ").strip()
                    break
            else:
                pytest.fail("it ended without naming its address")
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds, for a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_program_sends_prompts_and_scrapes_between_them(artefact: Path) -> None:
    def told(url: str) -> float:
        found = scraped(url)
        tokens = [value for key, value in found.items() if key[0] == "sedac_tokens_total"]
        layers = [value for key, value in found.items() if key[0] == "sedac_tokens_by_layer_total"]
        assert sum(tokens) == sum(layers)
        return sum(tokens)

    with started(artefact, "--mode", "certified") as (process, url):
        stdin: IO[str] = process.stdin  # type: ignore[assignment]
        assert told(url) == 0
        for answers in (1, 2):
            stdin.write(f"w{answers} w5 w9\n")
            stdin.flush()
            until(lambda most=answers * TOKENS: told(url) == most)  # type: ignore[misc]
        stdin.close()
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert process.stdout.read().count("> w") == 2


def test_it_goes_on_serving_until_interrupted_if_asked_to(artefact: Path) -> None:
    with started(artefact, "w4 w5", "--keep", "--json") as (process, url):
        assert process.stderr is not None
        for line in process.stderr:
            if "stays until" in line:
                break
        assert scraped(url)["sedac_reports_dropped_total",] == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
    assert result["url"] == url
    assert result["metrics"]["tokens"] == sum(one["new_tokens"] for one in result["answers"])


def run(*given: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, list(given), input=stdin)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_come_from_a_file(artefact: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    lines = ["w4 w5", "", "w6"]
    if suffix == ".jsonl":
        lines = ['{"prompt": "w4 w5"}', "", '{"text": "w6"}']
    file.write_text("\n".join(lines))
    result = run(*arguments(artefact, "--prompts", file, "--json", "--mode", "certified"))
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [one["prompt"] for one in values["answers"]] == ["w4 w5", "w6"]
    metrics = values["metrics"]
    assert metrics["tokens"] == 2 * TOKENS
    assert metrics["reports_dropped"] == 0
    exits = {int(layer): found["exits"] for layer, found in metrics["layers"].items()}
    by_answers = {
        layer: sum(one["exits_by_layer"][str(layer)] for one in values["answers"])
        for layer in exits
    }
    assert exits == by_answers
    assert sum(exits.values()) > 0


def test_prompts_that_cannot_be_are_refused(artefact: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    missing = tmp_path / "none.txt"
    for given in (("w4", "--prompts", empty), ("--prompts", empty), ("--prompts", missing), ("",)):
        result = run(*arguments(artefact, *given))
        assert result.exit_code == 2, given
        assert "prompt" in result.stderr
    with pytest.raises(UsageError, match="not both"):
        prompts_of("w4", empty)
