from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, pipeline

from sedac_hf import SedacForCausalLM
from tests.artefacts import issue, load_base, make_tokenizer, save_base, wrap_base

PROMPT = "w05 w09 w11"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    model = wrap_base(load_base(save_base(models / "base")))
    tokenizer = make_tokenizer(chat=True)
    model.save_pretrained(models / "artefact", tokenizer=tokenizer, certificate=issue())
    return models / "artefact"


def written(generator: Any, prompt: Any = PROMPT, **options: Any) -> Any:
    return generator(prompt, max_new_tokens=8, do_sample=False, **options)


def expected(model: Any, artefact: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    start = inputs["input_ids"].shape[1]
    return PROMPT + str(tokenizer.decode(output[0, start:], skip_special_tokens=True))


def test_the_pipeline_takes_the_object(artefact: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = SedacForCausalLM.from_pretrained(artefact)
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    model.exit_stats.reset()
    text = written(generator)[0]["generated_text"]
    assert text == expected(SedacForCausalLM.from_pretrained(artefact), artefact)
    assert model.exit_stats.tokens == 8
    assert model.exit_stats.exit_share > 0
    # Transformers logs an error, and goes on, when it does not know the class of a model.
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_the_pipeline_takes_a_saved_directory(artefact: Path) -> None:
    generator = pipeline("text-generation", model=str(artefact), device="cpu")
    assert isinstance(generator.model, SedacForCausalLM)
    text = written(generator)[0]["generated_text"]
    assert text == expected(SedacForCausalLM.from_pretrained(artefact), artefact)
    assert generator.model.exit_stats.exit_share > 0


def test_the_pipeline_hands_settings_on_to_the_base(artefact: Path) -> None:
    generator = pipeline(
        "text-generation",
        model=str(artefact),
        device="cpu",
        dtype="float32",
        model_kwargs={"attn_implementation": "eager"},
    )
    assert generator.model.base.config._attn_implementation == "eager"


def test_chats_batches_and_several_answers(artefact: Path) -> None:
    generator = pipeline("text-generation", model=str(artefact), device="cpu")
    chat = [{"role": "user", "content": PROMPT}]
    answer = written(generator, chat)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert re.fullmatch(r"(w\d+ ?)*", answer["content"])
    batch = written(generator, [PROMPT, "w07"], batch_size=2)
    assert batch[0][0]["generated_text"] == written(generator)[0]["generated_text"]
    several = written(generator, num_return_sequences=2, num_beams=2)
    assert len(several) == 2


def test_modes_can_be_chosen_in_the_call(artefact: Path) -> None:
    generator = pipeline("text-generation", model=str(artefact), device="cpu")
    base = generator.model.base
    text = written(generator, sedac_mode="off")[0]["generated_text"]
    assert text == expected(base, artefact)


def test_the_snippet_in_the_card_runs(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (artefact / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    assert 'name = "artefact"' in snippet.group(1)
    monkeypatch.chdir(artefact.parent)
    exec(snippet.group(1), {})
    printed = capsys.readouterr().out
    assert re.search(r"w\d+ w\d+", printed)
    assert "exits" in printed
