"""Self-written texts: chat and plain, seeded, resumed, checked for collapse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.texts import (
    ChatTemplate,
    RowSampler,
    answer_prompts,
    is_looping,
    write_texts,
)
from sedac_hf.errors import CalibrationError
from sedac_hf.modeling import SedacForCausalLM
from tests.micro_model import MicroModel

CHAT = (
    "{% for m in messages %}<bos> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}roll {% endif %}"
)


def write(micro: MicroModel, path: Path, tokens: int, seed: int = 0) -> list[Document]:
    """A short draw from the micro model."""
    return write_texts(
        micro.model, micro.tokenizer, path,
        tokens=tokens, seed=seed, rows=4, max_turn=6, max_answer=24, progress=False,
    )  # fmt: skip


def test_a_base_model_starts_from_its_first_token(micro_model: MicroModel, tmp_path: Path) -> None:
    documents = write(micro_model, tmp_path / "a.jsonl", 150)
    assert sum(map(len, documents)) >= 150
    first = micro_model.tokenizer.bos_token_id
    assert all(d.ids[0] == first and d.prompt_length >= 1 for d in documents)


def test_the_draw_is_seeded_and_goes_on_where_it_stopped(
    micro_model: MicroModel, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    whole = write(micro_model, tmp_path / "whole.jsonl", 300)
    assert torch.equal(state, torch.get_rng_state())
    write(micro_model, tmp_path / "parts.jsonl", 100)
    parts = write(micro_model, tmp_path / "parts.jsonl", 300)
    assert [d.hash for d in parts] == [d.hash for d in whole]
    other = write(micro_model, tmp_path / "other.jsonl", 300, seed=1)
    assert {d.hash for d in other} != {d.hash for d in whole}
    assert len({d.hash for d in whole}) == len(whole)


def test_a_chat_model_writes_both_turns(micro_model: MicroModel, tmp_path: Path) -> None:
    tokenizer = micro_model.language.tokenizer()
    tokenizer.chat_template = CHAT
    template = ChatTemplate.from_tokenizer(tokenizer)
    assert template is not None
    ids = micro_model.language.ids
    assert template.opening == [ids["<bos>"]]
    assert template.middle == [ids["<eos>"], ids["roll"]]
    documents = write_texts(
        micro_model.model, tokenizer, tmp_path / "chat.jsonl",
        tokens=100, rows=4, max_turn=6, max_answer=16, progress=False,
    )  # fmt: skip
    for document in documents:
        prompt = document.ids[: document.prompt_length].tolist()
        assert prompt[0] == ids["<bos>"]
        assert prompt[-2:] == template.middle
        assert len(document) - document.prompt_length >= 8


def test_each_row_draws_at_its_own_temperature_from_its_most_probable_words() -> None:
    sampler = RowSampler([1.0, 0.5, 2.0], words=3)
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(3, 4)
    counts = torch.zeros(3, 4)
    for _ in range(4000):
        found = sampler(torch.zeros(3, 1, dtype=torch.long), scores.clone())
        kept = found > -torch.inf
        assert kept.sum(-1).tolist() == [1, 1, 1]
        assert torch.equal(found[kept], scores[kept])
        counts += kept
    expected = (scores[:, :3] / torch.tensor([[1.0], [0.5], [2.0]])).softmax(-1)
    # Four standard errors of a share of 4,000 draws.
    torch.testing.assert_close(counts[:, :3] / 4000, expected, atol=0.032, rtol=0)
    assert not counts[:, 3].any()


def test_the_base_writes_through_the_native_pass(micro_model: MicroModel, monkeypatch) -> None:
    written = []
    own = SedacForCausalLM.generate

    def spy(self, *args, **given):
        out = own(self, *args, **given)
        written.append((self.exit_stats.runs_on, self.exit_stats.runs_on_reason))
        return out

    monkeypatch.setattr(SedacForCausalLM, "generate", spy)
    prompts = [d.ids[:4] for d in micro_model.language.documents(5, seed=12)]
    assert answer_prompts(micro_model.model, prompts, max_answer=24, rows=5)
    assert written == [("native", "")]


def test_prompts_are_answered_in_order_and_by_the_seed(micro_model: MicroModel) -> None:
    documents = micro_model.language.documents(7, seed=12)
    prompts = [document.ids[: 4 + at] for at, document in enumerate(documents)]
    state = torch.get_rng_state()
    first, again, other = (
        answer_prompts(micro_model.model, prompts, max_answer=24, seed=seed, rows=3)
        for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert [d.hash for d in first] == [d.hash for d in again] != [d.hash for d in other]
    assert 4 <= len(first) <= len(prompts)
    heads = [d.ids[: d.prompt_length].tolist() for d in first]
    assert heads == [prompt for prompt in prompts if prompt in heads]
    assert all(8 <= len(d) - d.prompt_length <= 24 for d in first)


def test_a_template_that_hides_the_user_is_refused(micro_model: MicroModel) -> None:
    tokenizer = micro_model.language.tokenizer()
    tokenizer.chat_template = "<bos>"
    with pytest.raises(CalibrationError, match="does not repeat"):
        ChatTemplate.from_tokenizer(tokenizer)


def test_loops_are_told_from_text() -> None:
    rng = np.random.default_rng(0)
    assert is_looping(Document(np.tile([1, 2, 3], 40)))
    assert not is_looping(Document(rng.integers(50, size=120)))
    assert not is_looping(Document(np.array([1, 1, 1, 1])))


def test_a_base_that_collapses_is_refused(micro_model: MicroModel, tmp_path: Path) -> None:
    config = micro_model.model.config
    constant = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
        # One word has all the probability, whatever came before.
        constant.model.norm.weight.fill_(1.0)
        constant.model.embed_tokens.weight[7] = 100.0
        constant.model.embed_tokens.weight[8] = 1.0
        constant.model.embed_tokens.weight[1] = 1.0
    with pytest.raises(CalibrationError, match="usable"):
        write_texts(
            constant, micro_model.tokenizer, tmp_path / "x.jsonl",
            tokens=5000, rows=4, max_answer=64, progress=False,
        )  # fmt: skip
