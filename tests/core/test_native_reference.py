"""The native pass on the reference model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import Placement

MODEL = Path(__file__).parents[2] / ".models" / "smollm2-135m-instruct"
PROMPT, NEW = 24, 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.reference,
    pytest.mark.skipif(not MODEL.exists(), reason="the reference model is not in .models"),
]


def chain(past: int, nodes: int) -> Placement:
    zero = np.zeros(1, np.int64)
    tree = np.tril(np.ones((nodes, nodes), np.bool_))[None]
    return Placement(zero, zero + past, np.arange(past, past + nodes)[None], tree)


def logits_of(run: NativePass, ids: Tensor, past: int) -> Tensor:
    at = chain(past, ids.shape[1])
    return run.logits(run.layers(run.embed(ids, at.positions), at, 0, run.num_layers))


def greedy(run: NativePass, first: Tensor, past: int) -> Tensor:
    """New tokens one after the other, and the logits of each step."""
    token, found = first, [first]
    for step in range(NEW - 1):
        token = logits_of(run, token, past + step).argmax(-1)
        found.append(token)
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verification_in_one_pass_gives_the_bits_of_single_steps(dtype: torch.dtype) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    model = NativeModel(BaseShell(base))
    assert model.reason is None
    ids = torch.arange(100, 100 + PROMPT)[None]
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        first = base(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    run = NativePass(model)
    run.load(cache)
    text = greedy(run, first, PROMPT)
    again = NativePass(model)
    again.load(cache)
    for start in range(0, NEW - 1, 8):
        part = text[:, start : start + 8]
        found = logits_of(again, part, PROMPT + start)
        alone = NativePass(model)
        alone.load(cache)
        logits_of(alone, text[:, :start], PROMPT) if start else None
        steps = [
            logits_of(alone, part[:, i : i + 1], PROMPT + start + i) for i in range(part.shape[1])
        ]
        assert torch.equal(torch.cat(steps, 1), found)
    if dtype == torch.float32:
        with torch.no_grad():
            expected = base.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(text, expected[:, PROMPT:])
