"""Parts of the command line: times, data types, texts, the coloured stream, tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from sedac_hf import cli_load
from sedac_hf.cli_fit import parse_checkpoints
from sedac_hf.cli_load import Loaded, pick_device, pick_dtype
from sedac_hf.cli_support import REPOSITORY, Screen, UsageError, parse_duration, write_json
from sedac_hf.cli_tables import evaluation_table, fit_table, info_table
from sedac_hf.cli_texts import documents_for, read_records, read_texts
from sedac_hf.cli_trace import TraceStreamer, depth_style, legend
from sedac_hf.errors import ConfigError
from tests.artefacts import make_tokenizer
from tests.wrapping import rule, wrap

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("3h", 10_800), ("1h30m", 5400), ("45", 45), ("1.5m", 90)],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-5m", "20 minutes", "m", "5d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="20m"):
        parse_duration(text, "--budget")


def test_checkpoints_are_read_in_order() -> None:
    specs = parse_checkpoints("15, 4,-1", head="block", feedback=True)
    assert [spec.layer_idx for spec in specs] == [-1, 4, 15]
    assert all(spec.feedback for spec in specs)


@pytest.mark.parametrize(
    ("text", "head", "error"),
    [("4,x", "block", UsageError), ("4,4", "block", UsageError), ("4", "cone", ConfigError)],
)
def test_checkpoints_that_cannot_be_are_refused(
    text: str, head: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        parse_checkpoints(text, head=head, feedback=False)


@pytest.mark.parametrize(
    ("native", "certified", "expected"),
    [
        (True, [], "bfloat16"),
        (False, [], "float32"),
        (False, ["float32"], "float32"),
        (False, ["bfloat16"], "bfloat16"),
        (True, ["float32"], "float32"),
        (True, ["float32", "bfloat16"], "bfloat16"),
    ],
)
def test_the_fastest_certified_data_type_is_picked(
    monkeypatch: pytest.MonkeyPatch, native: bool, certified: list[str], expected: str
) -> None:
    monkeypatch.setattr(cli_load, "cpu_computes_bf16", lambda: native)
    name, reason = pick_dtype("auto", CPU, certified)
    assert name == expected
    assert reason
    assert pick_dtype("float16", CPU, certified)[0] == "float16"


def test_unknown_devices_and_data_types_are_refused() -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        pick_dtype("int8", CPU, [])
    with pytest.raises(UsageError, match="--device"):
        pick_device("abacus")
    assert pick_device("cpu") == CPU


def test_a_number_that_is_not_finite_becomes_null(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": float("nan"), "b": [float("inf"), 1.5], 3: ("c",)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "3": ["c"]}


# ------------------------------------------------------------------------------------------ texts


def test_texts_are_read_from_files_of_every_kind(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "w1 w2"}\n\n{"prompt": "w3 ", "completion": "w4"}\n')
    plain = tmp_path / "b.txt"
    plain.write_text("w1 w2\nw3\n\n\nw4\n")
    tokenizer = make_tokenizer()
    assert read_texts(str(lines), tokenizer) == ["w1 w2", "w3 w4"]
    assert read_texts(str(plain), tokenizer) == ["w1 w2\nw3", "w4"]
    assert len(read_records(str(lines), limit=1)) == 1


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]
    path.write_text(json.dumps({"messages": messages}))
    assert read_texts(str(path), make_tokenizer(chat=True)) == ["w8 w05w9"]
    with pytest.raises(UsageError, match="chat template"):
        read_texts(str(path), make_tokenizer())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "w1"}\n{"text": \n', "line 2"),
        ("[1, 2]\n", "expected an object"),
        ('{"story": "w1"}\n', "expected text"),
        ("\n", "no texts"),
    ],
)
def test_texts_of_another_form_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        read_texts(str(path), make_tokenizer())


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_records(str(path))
    with pytest.raises(UsageError, match="no such file"):
        read_records(str(tmp_path / "gone.jsonl"))


@pytest.mark.reference
def test_the_reference_model_is_evaluated_on_texts_of_its_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / ".models" / "smollm2-135m-instruct")
    config = SimpleNamespace(base_model_name_or_path=".models/smollm2-135m-instruct")
    model: Any = SimpleNamespace(config=config)
    loaded = Loaded("bundled", model, tokenizer, "float32", "fast here")
    documents, origin = documents_for(loaded, None, 80, seed=0, screen=Screen(quiet=True))
    assert len(documents) == 80
    assert "base wrote" in origin
    assert len({document.hash for document in documents}) == 80
    opening = tokenizer("<|im_start|>system\n", add_special_tokens=False)["input_ids"]
    for document in documents:
        assert document.ids[: len(opening)].tolist() == opening
        assert 20 < document.prompt_length < len(document) - 4


# ----------------------------------------------------------------------------------------- stream


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are bytes, so that one character may take several tokens."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0x00>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stream(model: Any, tokens: list[int], console: Console | None, **options: Any) -> TraceStreamer:
    """Feed tokens as `generate` does: the prompt first, then one at a time."""
    streamer = TraceStreamer(model, byte_tokenizer(256), console, **options)
    streamer.put(torch.tensor([[1, 2]]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(llama: PreTrainedModel) -> None:
    model = wrap(llama)
    written = io.StringIO()
    text = "naïve 日本\nsecond line ü"
    streamer = stream(model, list(text.encode()), Console(file=written, width=200))
    assert written.getvalue().rstrip("\n") == text
    assert streamer.text == text
    assert len(streamer.tokens) == len(text.encode())


def test_text_that_ends_within_a_character_is_not_lost(llama: PreTrainedModel) -> None:
    written = io.StringIO()
    stream(wrap(llama), list("ab日".encode()[:-1]), Console(file=written, width=200))
    assert written.getvalue().startswith("ab\ufffd")


def test_colours_follow_the_depth_of_each_token(llama: PreTrainedModel) -> None:
    model = wrap(llama, {0: "lens", 1: "lens"}, [rule(0, 0.75), rule(1, 0.75)])
    tokenizer = make_tokenizer()
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=500)
    streamer = TraceStreamer(model, tokenizer, console)
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        min_new_tokens=40,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    assert streamer.layers == out.exit_layers[0].tolist()
    assert len(set(streamer.layers)) > 1
    written = console.file.getvalue()  # type: ignore[attr-defined]
    depth = model.exit_stats.depth
    for layer in {layer for layer in streamer.layers if layer < depth}:
        color = depth_style(layer, depth).color
        assert color is not None
        assert color.triplet is not None
        code = "38;2;{};{};{}".format(*color.triplet)
        assert written.count(code) == streamer.layers.count(layer)


def test_the_legend_counts_every_token() -> None:
    line = legend([0, 4, 4, 30, -1], [-1, 0, 4], 30).plain
    assert line == "■ embedding: 1  ■ layer 0: 1  ■ layer 4: 2  ■ all 30 layers: 1"
    assert depth_style(30, 30) != depth_style(4, 30) != depth_style(20, 30)


# ----------------------------------------------------------------------------------------- tables


def rendered(table: Any) -> str:
    """The table as text."""
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_evaluation_table_shows_missing_figures_as_missing() -> None:
    report = {
        "mode": "certified", "certified": True, "base_ppl": 12.3456, "sedac_ppl": None,
        "ppl_increase": None, "ppl_increase_ci95": [0.001, None],
        "exit_share": 0.25, "exits_by_layer": {"-1": 3, "7": 9},
        "mean_depth": 22.5, "depth": 30, "head_share": 0.21, "documents": 8, "tokens": 900,
        "speed": {
            "tokens_per_second": {"generate": 40.0, "plain": 42.0, "sedac": 50.0},
            "ratios": {"generate": {"median": 1.25, "interval": [1.2, 1.3]}, "plain": None},
        },
    }  # fmt: skip
    text = rendered(evaluation_table(report))
    for words in ("12.346", "- [+0.10%, -]", "22.5", "25.0%", "after the embedding", "50.0",
                  "1.25x [1.20, 1.30]", "21.0%"):  # fmt: skip
        assert words in text


def test_the_fit_table_has_a_row_a_head_and_a_column_a_gate() -> None:
    head = {
        "layer_idx": 11, "feedback": True, "steps": 250, "tokens": 400_000, "seconds": 120.0,
        "agreement": 0.4721, "stand_in_agreement": 0.43,
    }  # fmt: skip
    gates = [{"layer_idx": 11, "gate": "entropy", "auroc": 0.81, "share": 0.1}]
    text = rendered(fit_table({"heads": [head], "gates": gates}))
    for words in ("11", "yes", "400,000", "2.0", "0.472", "0.430", "AUROC", "0.810"):
        assert words in text


def test_values_are_never_taken_for_markup() -> None:
    text = rendered(info_table({"name": "[red]x[/]", "list": [1, None], "map": {"a": True}}))
    assert "[red]x[/]" in text
    assert "a yes" in text
