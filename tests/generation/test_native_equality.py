"""Exact mode is plain mode, token for token, in every type: the reference model over the pass.

By default a few hundred tokens; `SEDAC_EQUAL_TOKENS=10000` asks for more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sedac_hf import SedacForCausalLM
from sedac_hf.evaluation.prompts import PROMPT_GROUPS, load_prompts

ROOT = Path(__file__).parents[2]
ARTEFACT = ROOT / "examples" / "smollm2-135m-instruct-sedac"
MODEL = ROOT / ".models" / "smollm2-135m-instruct"
TOKENS = int(os.environ.get("SEDAC_EQUAL_TOKENS", "300"))
EACH = 100  # new tokens of a call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.reference,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL.exists(), reason="the reference model is not in .models"),
]


def chats(tokenizer: Any) -> Iterator[Tensor]:
    """Prompts of all groups in turn, each with another beginning once all have been had."""
    groups = [load_prompts(group) for group in PROMPT_GROUPS]
    texts = [text for each in zip(*groups, strict=False) for text in each]
    for number, text in enumerate(cycle(texts)):
        turn = number // len(texts)
        message = {"role": "user", "content": f"({turn}) {text}" if turn else text}
        yield tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exact_is_plain(dtype: str) -> None:
    model = SedacForCausalLM.from_pretrained(ARTEFACT, dtype=dtype, base_model=str(MODEL)).eval()
    given: dict[str, Any] = {
        "max_new_tokens": EACH, "min_new_tokens": EACH, "do_sample": False, "pad_token_id": 0,
        "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(ARTEFACT)
    for number, ids in enumerate(islice(chats(tokenizer), -(-TOKENS // EACH))):
        plain = model.generate(ids, **given, sedac_mode="plain")
        assert plain.shape[1] == ids.shape[1] + EACH
        exact = model.generate(ids, **given, sedac_mode="exact")
        assert torch.equal(exact, plain), f"prompt {number}"
        if dtype == "float32":
            expected = model.base_lm.generate(ids, **given)
            assert torch.equal(plain, expected), f"prompt {number} against the base"
    assert model.exit_stats.runs_on == "native"
    assert model.exit_stats.drafts.tokens_per_pass > 1.1
