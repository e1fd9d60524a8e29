"""`sedac fit` on the micro model, and what the other commands do with the result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sedac_hf.calibration.fit_settings import FitReport
from tests.artefacts import save_base
from tests.cli_command import call as sedac
from tests.micro_model import NUM_LAYERS, MicroModel


def write_texts(micro: MicroModel, path: Path, count: int, seed: int) -> Path:
    """Documents of the micro language as JSON lines."""
    documents = micro.language.documents(count, seed=seed)
    lines = [json.dumps({"text": micro.language.text(document)}) for document in documents]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def fitted(micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What one `sedac fit --json` wrote and said."""
    folder = tmp_path_factory.mktemp("cli-fit")
    base = micro_model.save(folder / "base")
    data = write_texts(micro_model, folder / "texts.jsonl", 900, seed=31)
    output = folder / "artefact"
    options = ("--budget", "10m", "--checkpoints", "1,3", "--epsilon", "0.03", "--json", "-q")
    # On so small a model no exit saves time; by its parameters it would.
    options = (*options, "--costs", "parameters")
    return output, sedac("fit", base, "-o", output, "--data", data, *options)


@pytest.mark.slow
def test_fit_certifies_and_says_what_it_did(fitted: tuple[Path, Any]) -> None:
    output, result = fitted
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert values["certified"] is True
    assert values["output"] == str(output)
    report = values["report"]
    assert report["heads"][0]["layer_idx"] == 1
    assert report["heads"][0]["agreement"] > 0.5
    assert set(report["documents"]) == {"train", "probe", "search", "certify", "held_out"}
    assert (output / "certificate.json").is_file()
    assert (output / "README.md").is_file()


@pytest.mark.slow
def test_chain_words_leave_early_and_perplexity_hardly_rises(
    fitted: tuple[Path, Any], micro_model: MicroModel, tmp_path: Path
) -> None:
    output, _ = fitted
    options = ("--raw", "--max-new-tokens", 96, "--temperature", 1, "--trace", "--json", "-q")
    options = (*options, "--mode", "certified")
    values = json.loads(sedac("generate", output, "k1a k1b k1c k1d k1e", *options).stdout)
    assert values["exit_share"] > 0.1
    assert values["mean_depth"] < NUM_LAYERS
    words = [(token["text"].strip(), token["layer"] < NUM_LAYERS) for token in values["tokens"]]
    chain = [early for word, early in words if word.startswith("k") and not word.endswith("a")]
    assert len(chain) > 10
    assert sum(chain) > len(chain) / 2

    data = write_texts(micro_model, tmp_path / "new.jsonl", 40, seed=99)
    options = ("--no-speed", "--max-increase", 0.06, "--json", "-q")
    result = sedac("eval", output, "--data", data, *options)
    assert result.exit_code == 0
    evaluated = json.loads(result.stdout)
    assert evaluated["exit_share"] > 0.1
    assert evaluated["certificate"]["accepted"] >= 1


def test_a_fit_that_certifies_nothing_ends_with_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    seen: dict[str, Any] = {}

    def fake(model: Any, texts: Any, **options: Any) -> Any:
        seen.update(options, texts=texts)
        return SimpleNamespace(cascade=None), FitReport()

    monkeypatch.setattr("sedac_hf.calibration.fitting.fit", fake)
    result = sedac(
        "fit", base, "-o", tmp_path / "out", "--budget", "2m", "--checkpoints", "0,1",
        "--head", "lens", "--epsilon", "0.02", "--delta", "0.2", "--tokens", "5000", "--seed", "9",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "exits stay off" in result.stdout
    settings = seen["settings"]
    assert [spec.layer_idx for spec in settings.checkpoints] == [0, 1]
    assert {spec.head for spec in settings.checkpoints} == {"lens"}
    assert settings.budget_seconds == 120
    assert (settings.epsilon, settings.delta) == (0.02, 0.2)
    assert (settings.text_tokens, settings.seed) == (5000, 9)
    assert seen["texts"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--epsilon", "0"), "--epsilon"),
        (("--epsilon", "2"), "--epsilon 2"),
        (("--delta", "1.5"), "--delta"),
        (("--head", "lens"), "--checkpoints"),
        (("--checkpoints", "1,1"), "twice"),
        (("--data", "gone.jsonl"), "no such file"),
        (("--dtype", "int8"), "--dtype"),
        (("--device", "abacus"), "--device"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    base = save_base(tmp_path / "base")
    result = sedac("fit", base, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv", "copy"), ("--kv copy", "propagate, settle")),
        (("--kv", ""), ("--kv", "propagate, settle")),
        (("--costs", "free"), ("--costs free", "measured or parameters")),
        (("--train-data", "gone.jsonl"), ("--train-data gone.jsonl", "no such file")),
        (("--train-data", "empty.txt"), ("--train-data empty.txt", "no texts")),
        (("--train-data", "fields.jsonl"), ("['story']", "expected text")),
        (("--train-data", "short.txt"), ("--train-data", "none of the 2", "16 tokens")),
        (("--checkpoints", "1;2"), ("--checkpoints '1;2'", "11,15,20")),
        (("--checkpoints", ""), ("--checkpoints ''", "11,15,20")),
        (("--checkpoints", "2.5"), ("--checkpoints '2.5'", "whole numbers")),
        (("--checkpoints", "1,1"), ("--checkpoints 1,1", "twice")),
        (("--checkpoints", "-4"), ("after layer -4", "-1 (the embedding) or more")),
        (("--checkpoints", "1,3"), ("after layer 3", "4 layers", "at most 2")),
        (("--budget", "soon"), ("--budget 'soon'", "90s, 20m or 1h30m")),
        (("--budget", "-5m"), ("--budget '-5m'", "above 0")),
        (("--budget", "0"), ("--budget '0'", "above 0")),
        (("--tokens", "-3"), ("--tokens", "1")),
        (("--tokens", "0"), ("--tokens", "1")),
    ],
)
def test_mistakes_are_named_with_what_was_expected_and_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    Path("empty.txt").write_text("\n\n")
    Path("fields.jsonl").write_text('{"story": "w4 w5"}\n')
    Path("short.txt").write_text("w4 w5\n\nw6 w7 w8\n")
    result = sedac("fit", "base", "-o", "out", *options)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr
    assert not Path("out").exists()
    assert not list(Path().glob("out.work/*.jsonl"))  # the base has written nothing


def test_an_artefact_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sedac"}')
    result = sedac("fit", tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "artefact already" in result.stderr
