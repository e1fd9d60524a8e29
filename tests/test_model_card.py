from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sedac_hf.model_card import CardSource, model_card
from tests.artefacts import issue

CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/base-1b",
    "text_config": {"num_hidden_layers": 30},
    "checkpoints": [
        {"layer_idx": -1, "head": "block", "feedback": True, "num_layers": 1},
        {"layer_idx": 4, "head": "block", "num_layers": 2, "storage": "delta", "delta_rank": 16},
        {"layer_idx": 12, "head": "lens", "lens_rank": 64},
    ],
    "mode": "certified",
    "probe_rank": 32,
    "probe_target": "divergence",
    "sedac_format_version": 1,
    "fingerprint": {"weights": {"norms": "ab" * 32, "head": "cd" * 32, "layers": None}},
}
RESULTS: dict[str, Any] = {
    "base_ppl": 12.345678,
    "sedac_ppl": 12.4,
    "ppl_increase": 0.0044,
    "ppl_increase_ci95": [0.001, 0.0078],
    "exit_share": 0.256,
    "exits_by_layer": {"4": 120, "12": 380, "-1": 7},
    "mean_depth": 24.5,
    "depth": 30,
    "speed_vs_generate": 1.31,
    "speed_vs_plain": 1.16,
    "head_share": 0.21,
    "documents": 200,
    "tokens": 40_000,
    "speed": {"prompt_lengths": [10, 12], "max_new_tokens": 64},
    "machine": {"processor": "Some CPU", "threads": 2},
    "config": {"dtype": "bfloat16"},
    "fit": {
        "command": "sedac fit org/base-1b -o out",
        "seconds": {"texts": 330.0, "heads": 7200.0},
        "tokens": 650_000,
        "documents": {"train": 2_000, "certify": 800},
        "self_written": True,
        "heads": [
            {
                "layer_idx": 4,
                "feedback": True,
                "seconds": 130.0,
                "tokens": 20_000,
                "agreement": 0.4712,
            },
            {"layer_idx": 12, "feedback": False, "agreement": 0.5, "top": {2: 0.61, 4: 0.7}},
        ],
        "gates": [{"layer_idx": 4, "gate": "entropy", "auroc": 0.8123}],
    },
}
SOURCE = CardSource("user/base-1b-sedac", CONFIG, 12_400_000, base_model="org/base-1b")


def text_of(source: CardSource) -> str:
    return str(model_card(source))


def test_metadata_names_library_base_and_task() -> None:
    data = model_card(SOURCE).data
    assert data.library_name == "sedac_hf"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "org/base-1b"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert {"sedac", "early-exit", "base_model:adapter:org/base-1b"} <= set(data.tags)
    assert data.eval_results is None


def test_a_base_without_a_hub_name_stays_out_of_the_metadata() -> None:
    config = CONFIG | {"base_model_name_or_path": ".models/some-base"}
    card = model_card(replace(SOURCE, config=config, base_model=None, base_note="Look in .models."))
    assert card.data.base_model is None
    assert not any(tag.startswith("base_model") for tag in card.data.tags)
    assert "`.models/some-base`" in card.text
    assert "Look in .models." in card.text


def test_measurements_become_a_model_index_and_a_table(tmp_path: Path) -> None:
    card = model_card(replace(SOURCE, results=RESULTS))
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    values = {(e.metric_type, e.metric_name): e.metric_value for e in loaded.data.eval_results}
    assert values["perplexity", "Perplexity of the base"] == 12.34568
    assert values["speedup", "Tokens per second against the same loop without exits"] == 1.16
    assert len(values) == 7
    assert "| perplexity of the base | 12.346 |" in card.text
    assert "| 95 % interval over documents | +0.10 % to +0.78 % |" in card.text
    assert "| mean depth | 24.50 of 30 layers |" in card.text
    assert card.text.index("exits after layer -1") < card.text.index("exits after layer 4")
    assert card.text.index("exits after layer 4") < card.text.index("exits after layer 12")
    assert (
        "Perplexity on 200 held-out documents, 40,000 tokens; speed at batch 1, greedy, 2 prompts, "
        "64 new tokens each (bfloat16, Some CPU, 2 threads)." in card.text
    )


def test_how_it_was_trained_is_told() -> None:
    text = text_of(replace(SOURCE, results=RESULTS))
    assert "- command: `sedac fit org/base-1b -o out`" in text
    assert "- time: 2 h 5 min (texts 5 min, heads 2 h 0 min)" in text
    assert "- tokens: 650,000" in text
    assert "- documents: 2,800 (train 2,000, certify 800)" in text
    assert "- texts: texts that the base wrote itself" in text
    assert "| after layer | deep feedback | time | tokens | agreement | among the first |" in text
    assert "| 4 | yes | 2 min | 20,000 | 0.471 |  |" in text
    assert "| 12 | no |  |  | 0.500 | 0.610 (2), 0.700 (4) |" in text
    assert "| 4 | entropy | 0.812 |" in text
    assert "probes trained on the divergence, rank 32" in text


def test_given_texts_are_not_called_self_written() -> None:
    results = {"base_ppl": 9.0, "fit": {"self_written": False, "tokens": 5}}
    card = model_card(replace(SOURCE, results=results))
    assert "wrote itself" not in card.text
    assert card.data.eval_results[0].dataset_name == "Held-out documents (given texts)"


@pytest.mark.parametrize("issued", [None, issue(), issue(passes=False)])
@pytest.mark.parametrize("results", [{}, RESULTS])
def test_paragraphs_are_one_blank_line_apart(issued: Any, results: dict[str, Any]) -> None:
    values = issued.to_dict() if issued else None
    certified = issued is not None and issued.policy is not None
    text = text_of(replace(SOURCE, certificate=values, certified=certified, results=results))
    assert "\n\n\n" not in text
    assert not re.search(r"[^|\n]\n\|", text), "a table must follow a blank line"


def test_without_results_nothing_is_invented() -> None:
    text = text_of(SOURCE)
    assert "## Measured" not in text
    assert "no record of the fit" in text
    assert "wrote itself" not in text
    assert not re.search(r"\b(None|nan|undefined)\b", text)


def test_numbers_that_are_missing_or_not_finite_are_left_out() -> None:
    results = {
        "base_ppl": 10.0,
        "sedac_ppl": None,
        "ppl_increase_ci95": [None, None],
        "speed": None,
    }
    card = model_card(replace(SOURCE, results=results))
    assert [e.metric_value for e in card.data.eval_results] == [10.0]
    assert "95 %" not in card.text
    assert "None" not in card.text


def test_checkpoints_are_listed() -> None:
    text = text_of(SOURCE)
    assert "| embedding of 30 | 1 decoder layer | yes | whole |" in text
    assert "| 4 of 30 | 2 decoder layers | no | rank-16 delta |" in text
    assert "| 12 of 30 | lens of rank 64 | no | whole |" in text
    assert "(12.4 MB): 3 checkpoints, each with a risk probe" in text
    single = text_of(replace(SOURCE, config=CONFIG | {"checkpoints": CONFIG["checkpoints"][:1]}))
    assert ": 1 checkpoint with a risk probe" in single


def test_a_certificate_is_stated_with_its_conditions() -> None:
    issued = issue(dtype="bfloat16")
    values = issued.to_dict()
    text = text_of(replace(SOURCE, certificate=values, certified=True))
    assert issued.statement() in text
    assert "| allowed rise of perplexity (epsilon) | 1.00 % |" in text
    assert "| confidence (1 - delta) | 90 % |" in text
    assert "| documents tested on | 260 |" in text
    assert f"| rise seen on them | {100 * math.expm1(0.004):+.2f} % |" in text
    assert "| rise on 80 further documents | +0.31 % (95 % interval +0.10 % to +0.50 %) |" in text
    assert "| data type | bfloat16 |" in text


def test_a_certificate_that_nothing_passed_says_so_and_claims_nothing() -> None:
    issued = issue(passes=False)
    text = text_of(replace(SOURCE, certificate=issued.to_dict(), certified=False))
    assert issued.statement() in text
    assert "exits stay off in certified mode" in text
    assert "epsilon" not in text


def test_without_a_certificate_the_card_says_that_exits_are_off() -> None:
    assert "No certificate comes with this artefact" in text_of(SOURCE)


@pytest.mark.parametrize("chat", [False, True])
def test_the_snippet_is_python_and_names_the_artefact(chat: bool) -> None:
    text = text_of(replace(SOURCE, chat=chat))
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet
    ast.parse(snippet.group(1))
    assert 'name = "user/base-1b-sedac"' in snippet.group(1)
    assert ("apply_chat_template" in snippet.group(1)) == chat


def test_further_metadata_is_merged() -> None:
    data = model_card(replace(SOURCE, metadata={"license": "apache-2.0", "tags": ["cpu"]})).data
    assert data.license == "apache-2.0"
    assert {"cpu", "sedac"} <= set(data.tags)
