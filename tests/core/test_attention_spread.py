"""The spread of attention beside the base's own, against weights that eager attention gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import sedac_hf.core.attention_spread as module
from sedac_hf.core.attention_spread import Spread, spread_of, spread_reason
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.estimators import AttentionEntropyEstimator, Observation
from tests.threads import in_threads
from tests.tiny_models import LAYERS, WINDOW, build_tiny, prompt

# Those whose layers go through transformers' attention interface; windows, soft caps, groups.
WITH = (
    "llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "smollm3",
    "llama4",
)  # fmt: skip
WITHOUT = ("falcon", "bloom", "mpt", "gpt-neo")
LENGTH = 3 * WINDOW


def by_weights(base: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """What the definition makes of the weights of an eager copy, `[layers, rows, seq]`."""
    eager = copy.deepcopy(base)
    eager.set_attn_implementation("eager")
    found = eager(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    rule = AttentionEntropyEstimator()
    states = torch.zeros(*ids.shape, 1)
    weights = [w.transpose(1, 2) for w in found.attentions]
    return torch.stack([rule.risk(Observation(states, attention=w)) for w in weights]).float()


def observed(shell: BaseShell, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Spreads of all layers and their outputs, each held against the layer's own."""
    spreads, outputs = [], []

    def loop(hidden: Tensor, calls: list[Any]) -> Tensor:
        for layer, call in zip(shell.layer_list, calls, strict=True):
            seen = Spread()
            output = seen.run(layer, hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            assert seen.risk is not None
            spreads.append(seen.risk)
            outputs.append(hidden)
        return hidden

    shell.run(loop, **arguments)
    return torch.stack(spreads), outputs


@torch.no_grad()
@pytest.mark.parametrize("name", WITH)
def test_it_is_the_definition_on_eager_weights(name: str) -> None:
    base = build_tiny(name)
    shell = BaseShell(base)
    before = copy.deepcopy(base.config.to_dict())
    kind = base.config._attn_implementation
    ids, mask = prompt(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    for given in (None, mask):
        expected = by_weights(base, ids, given)
        found, outputs = observed(shell, input_ids=ids, attention_mask=given, use_cache=False)
        real = slice(None) if given is None else given.bool()
        torch.testing.assert_close(found[:, real], expected[:, real], rtol=2e-5, atol=1e-6)
        assert expected.std() > 0.01
        hidden, calls = shell.prologue(input_ids=ids, attention_mask=given, use_cache=False)
        for i, output in enumerate(outputs):
            hidden = shell.layer(i, hidden, calls[i])
            assert torch.equal(hidden, output)  # the base's own bits
    assert spread_reason(shell, LAYERS - 1) is None
    assert base.config.to_dict() == before
    assert base.config._attn_implementation == kind


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_step_behind_a_cache_is_the_last_of_the_whole(name: str, cache: str) -> None:
    base = build_tiny(name)
    shell = BaseShell(base)
    ids, mask = prompt(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    expected = by_weights(base, ids, mask)
    kept: Any = DynamicCache(config=base.config)
    if cache == "static":
        kept = StaticCache(config=base.config, max_cache_len=LENGTH + 4)
    before = LENGTH - 2
    first, _ = observed(
        shell, input_ids=ids[:, :before], attention_mask=mask[:, :before], **shell.cached(kept)
    )
    real = mask[:, :before].bool()
    torch.testing.assert_close(
        first[:, real], expected[:, :, :before][:, real], rtol=2e-5, atol=1e-6
    )
    for at in range(before, LENGTH):
        found, _ = observed(
            shell, input_ids=ids[:, at : at + 1], attention_mask=mask[:, : at + 1],
            position_ids=mask[:, : at + 1].sum(-1, keepdim=True) - 1, **shell.cached(kept),
        )  # fmt: skip
        # Positions differ by the padding from those of the whole; rotary does not care.
        if name not in ("gpt2",):
            torch.testing.assert_close(found[:, 1:, 0], expected[:, 1:, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_other_attention_is_refused_with_a_reason(name: str) -> None:
    shell = BaseShell(build_tiny(name))
    reason = spread_reason(shell, 1)
    assert reason is not None
    assert "attention" in reason
    hidden, calls = shell.prologue(input_ids=prompt(1, 4), use_cache=False)
    seen = Spread()
    call = calls[1]
    with torch.no_grad():
        seen.run(shell.layer_list[1], hidden, *call.args, **call.kwargs)
    assert seen.risk is None


def test_the_embedding_attends_to_nothing() -> None:
    reason = spread_reason(BaseShell(build_tiny("llama")), -1)
    assert reason is not None
    assert "embedding" in reason


def test_an_attention_that_would_come_out_otherwise_is_refused() -> None:
    base = build_tiny("gpt2", reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True)
    base.set_attn_implementation("eager")
    shell = BaseShell(base.to(torch.bfloat16))
    reason = spread_reason(shell, 2)
    assert reason is not None
    assert "otherwise" in reason


def test_masks_that_cannot_be_read_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(2, 4, 3, 8)
    attention = torch.nn.Module()
    for mask, kwargs in ((object(), {}), (None, {"cu_seq_lens_q": torch.zeros(2)})):
        found = module._seen(attention, "flash_attention_2", query, query, mask, None, kwargs)
        assert found.shape == (2, 3)
        assert found.isnan().all()


@pytest.mark.parametrize("kind", ["sdpa", "flash_attention_2"])
def test_order_alone_hides_what_comes_later(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 5, 8, generator=generator)
    key = torch.randn(1, 2, 5, 8, generator=generator)
    attention = torch.nn.Module()
    found = module._seen(attention, kind, query, key, None, None, {"sliding_window": 3})
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * 8**-0.5
    place = torch.arange(5)
    hidden = place[None] > place[:, None]
    if kind != "sdpa":  # windows are in sdpa's masks
        hidden |= place[:, None] - place[None] >= 3
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    seen = Observation(torch.zeros(1, 5, 1), attention=weights.transpose(1, 2))
    expected = AttentionEntropyEstimator().risk(seen).float()
    torch.testing.assert_close(found, expected)
    padded = torch.tensor([[0, 1, 1, 1, 1]])
    some = module._seen(attention, "flash_attention_2", query, key, padded, None, {})
    alone = spread_of(query[:, :, 1:], key[:, :, 1:], torch.ones(4, 4).tril().bool())
    torch.testing.assert_close(some[:, 1:], alone)
    assert some[:, 0].isnan().all()  # sees nothing


def test_sinks_take_weight_and_are_no_keys() -> None:
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 7, 8)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    whole = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, -1, -1, -1)], -1).softmax(-1)
    seen = Observation(torch.zeros(2, 1, 1), attention=whole[..., :-1].transpose(1, 2))
    expected = AttentionEntropyEstimator().risk(seen).float()
    found = spread_of(query, key, None, scaling=0.3, sinks=sinks)
    torch.testing.assert_close(found, expected)


def test_a_lone_key_is_no_spread_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    seen = torch.ones(9, 9).tril().bool()[None, None]
    whole = spread_of(query, key, seen, softcap=5.0, bias=torch.randn(1, 4, 9, 9).zero_())
    assert (whole[:, 0] == 0).all()
    monkeypatch.setattr(module, "_MAX_SCORES", 100)
    torch.testing.assert_close(
        spread_of(query, key, seen, softcap=5.0, bias=torch.zeros(1, 4, 9, 9)), whole
    )


@torch.no_grad()
def test_threads_see_their_own() -> None:
    shell = BaseShell(build_tiny("llama"))
    texts = [prompt(1, LENGTH, seed) for seed in range(4)]
    expected = [observed(shell, input_ids=ids, use_cache=False)[0] for ids in texts]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found, _ = observed(shell, input_ids=texts[i], use_cache=False)
                if not torch.allclose(found, expected[i]):
                    wrong.append(i)

    in_threads(work, 4)
    assert not wrong
