"""Exact mode against the base's own generate: the same tokens, the same distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from sedac_hf.core.module_pass import ModulePass
from sedac_hf.modeling import SedacForCausalLM
from tests.generation.drafting import EXACT, GREEDY, NEW, knowing, padded, passes
from tests.generation.drafting import _eager as _eager
from tests.generation.drafting import modules as modules
from tests.tiny_models import build_tiny, prompt
from tests.wrapping import wrap


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("kinds", [{-1: "feedback"}, {1: "block"}], ids=str)
def test_greedy_tokens_are_the_bases(
    tiny: PreTrainedModel, kinds: dict[int, str], rows: int
) -> None:
    model = wrap(tiny, kinds)
    given = padded(rows)
    expected = tiny.generate(**given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY, **EXACT), expected)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("rows", [1, 4])
def test_accepted_drafts_are_the_bases_tokens(
    tiny: PreTrainedModel, rows: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = knowing(tiny, noise)
    given = padded(rows)
    expected = tiny.generate(**given, **GREEDY)
    model.generate(**given, max_new_tokens=2, **EXACT)  # finds out what serves the model
    seen = passes(monkeypatch)
    assert torch.equal(model.generate(**given, **GREEDY, **EXACT), expected)
    if noise == 0:
        # What a random model says is flat, so not every right draft is among the eight nodes.
        assert len(seen) <= (NEW - 1) * 2 // 3


def test_the_text_alone_drafts_where_there_are_no_heads(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SedacForCausalLM.from_base(llama)
    given = padded(3)
    long = {**GREEDY, "max_new_tokens": 60}
    expected = llama.generate(**given, **long)
    seen = passes(monkeypatch)
    assert torch.equal(model.generate(**given, **long, **EXACT), expected)
    assert len(seen) < 60 + 2  # two of them are those of the check
    assert max(seen) > 4


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_seed_gives_the_text_that_it_gives_the_base(
    llama: PreTrainedModel, rows: int, noise: float
) -> None:
    model = knowing(llama, noise)
    given = padded(rows)
    values = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    for seed in range(4):
        torch.manual_seed(seed)
        expected = llama.generate(**given, **values, num_return_sequences=2)
        torch.manual_seed(seed)
        found = model.generate(**given, **values, num_return_sequences=2, **EXACT)
        assert torch.equal(found, expected)


def test_samples_have_the_bases_distribution() -> None:
    """Chi-squared over pairs of tokens; the exit drafts something else than what is right."""
    base = build_tiny("llama", vocab_size=7, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        base.lm_head.weight.mul_(0.2)
    model = knowing(base, 0.05)
    ids = prompt(1, 5) % 7
    draws, new = 4000, 2
    with torch.no_grad():
        first = base(ids).logits[0, -1].softmax(-1)
        pairs = torch.cat([ids.expand(7, -1), torch.arange(7)[:, None]], dim=1)
        chances = (first[:, None] * base(pairs).logits[:, -1].softmax(-1)).flatten().double()
    torch.manual_seed(0)
    text = model.generate(
        ids.expand(draws // 20, -1),
        num_return_sequences=20,
        do_sample=True,
        top_k=0,
        max_new_tokens=new + 2,  # so that the tokens that count are drafted
        **EXACT,
    )
    found = torch.bincount(text[:, 5] * 7 + text[:, 6], minlength=49).double()
    expected = chances * draws
    large = expected > 5
    statistic = float(((found - expected) ** 2 / expected)[large].sum())
    freedom = int(large.sum()) - 1
    # Beyond this a right sampler comes once in ten thousand times or less.
    assert statistic < freedom + 3.72 * (2 * freedom) ** 0.5 + 10
    assert int(found[~large].sum()) < expected[~large].sum() + 5 * draws**0.5


def test_padding_in_the_middle_runs_at_full_depth(llama: PreTrainedModel) -> None:
    given = padded(2)
    given["attention_mask"][0, 4] = 0
    expected = llama.generate(**given, **GREEDY)
    assert torch.equal(knowing(llama).generate(**given, **GREEDY, **EXACT), expected)


@pytest.mark.parametrize("where", ["head", "base"])
def test_what_is_not_a_number_is_never_accepted_as_a_draft(
    llama: PreTrainedModel, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = knowing(llama)
    given = padded(1)
    expected = llama.generate(**given, **GREEDY)
    model.generate(**given, max_new_tokens=2, **EXACT)
    name = "_draft_logits" if where == "head" else "logits"
    run = getattr(ModulePass, name)
    kept = []
    keep = ModulePass.keep

    def broken(self: ModulePass, hidden: Tensor) -> Tensor:
        logits = run(self, hidden).clone()
        logits[..., 7] = float("nan")
        return logits

    def noted(self: ModulePass, part: int, length: Any, path: Any, counts: Any) -> None:
        kept.append(int(np.max(counts)))
        keep(self, part, length, path, counts)

    monkeypatch.setattr(ModulePass, name, broken)
    monkeypatch.setattr(ModulePass, "keep", noted)
    found = model.generate(**given, **GREEDY, **EXACT)
    if where == "head":
        assert torch.equal(found, expected)
    else:
        assert set(found[0, 10:].tolist()) == {7}  # as argmax has it, in the base too
    assert max(kept) == 1 if where == "base" else kept
