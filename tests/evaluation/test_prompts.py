from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import pytest

from sedac_hf.errors import ConfigError
from sedac_hf.evaluation import prompts as module
from sedac_hf.evaluation.prompts import PROMPT_GROUPS, encode_prompt, load_prompts
from tests.artefacts import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def words(text: str) -> str:
    """The text's letters and digits only, so that spaces and punctuation do not matter."""
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("group", PROMPT_GROUPS)
def test_every_group_has_at_least_twenty_prompts_and_no_two_alike(group):
    found = load_prompts(group)
    assert len(found) >= 20
    everything = [words(p) for p in chain.from_iterable(map(load_prompts, PROMPT_GROUPS))]
    assert len(set(everything)) == len(everything)


def test_batches_of_eight_come_out_even():
    assert {len(load_prompts(group)) % 8 for group in PROMPT_GROUPS} == {0}


def test_grounded_prompts_hold_a_text_of_80_to_200_words():
    for prompt in load_prompts("grounded"):
        task, text = prompt.split("\n\n")
        assert 80 <= len(text.split()) <= 200, task
        assert task.endswith((".", "?"))


def test_no_prompt_is_in_the_texts_that_models_are_evaluated_on():
    lines = (ROOT / "examples" / "eval_texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [words(" ".join(json.loads(line).values())) for line in lines]
    assert len(texts) > 50
    for prompt in chain.from_iterable(map(load_prompts, PROMPT_GROUPS)):
        for part in prompt.split("\n\n"):
            if len(words(part).split()) >= 5:
                assert not any(words(part) in text for text in texts), part


def test_fewer_prompts_are_spread_over_the_group():
    everything = load_prompts("code")
    some = load_prompts("code", 3)
    assert [everything.index(prompt) for prompt in some] == [0, 12, 23]
    assert load_prompts("code", 500) == everything


def test_what_is_no_group_is_refused():
    with pytest.raises(ConfigError, match="grounded"):
        load_prompts("poems")
    with pytest.raises(ConfigError, match="at least 1"):
        load_prompts("chat", 0)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"task": "Shorten this."}', '{"prompt": " "}', '{"prompt": 3}']
)
def test_a_damaged_file_is_named_with_its_line(line, tmp_path, monkeypatch):
    (tmp_path / "chat.jsonl").write_text('{"prompt": "What is a word?"}\n' + line + "\n")
    monkeypatch.setattr(module, "files", lambda _: tmp_path)
    with pytest.raises(ConfigError, match=r"chat\.jsonl, line 2"):
        load_prompts("chat")


def test_a_prompt_becomes_a_chat_where_the_tokenizer_knows_one():
    plain, chat = make_tokenizer(), make_tokenizer(chat=True)
    assert encode_prompt(plain, "w08 w09") == encode_prompt(chat, "w08 w09", raw=True) == [8, 9]
    assert encode_prompt(chat, "w08", system="w07") == chat("w07 w08 w05")["input_ids"]
    with pytest.raises(ConfigError, match="chat template"):
        encode_prompt(plain, "w08", system="w07")
