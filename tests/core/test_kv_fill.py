"""K/V of skipped layers: the stacked product says what the layers say, and knows when not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sedac_hf.core import stacked_kv
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.kv_fill import KVFill, KVOnlyCache, fill_by_proxy, write_layer_kv
from sedac_hf.errors import SedacError
from tests.tiny_models import LAYERS, WIDTH, build_tiny, prompt
from tests.wrapping import wrap

FIRST = 1
STACKABLE = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "mixtral"}


def filled(
    base: PreTrainedModel, fill: Callable[..., None], rows: int, seq: int, kind: Any = DynamicCache
) -> list[tuple[Tensor, Tensor]]:
    """K and V that a way of filling writes for new positions behind a prompt."""
    shell = BaseShell(base)
    size = {"max_cache_len": 16} if kind is StaticCache else {}
    cache = kind(config=base.config, **size)
    base(prompt(rows, 4), past_key_values=cache, use_cache=True)
    ids = prompt(rows, seq, seed=1)
    _, calls = shell.prologue(input_ids=ids, **shell.cached(cache))
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn((rows, seq, WIDTH), generator=generator).to(base.dtype)
    fill(shell, hidden, calls)
    return [(layer.keys, layer.values) for layer in cache.layers[FIRST:]]


def by_proxy(shell: BaseShell, hidden: Tensor, calls: list[Any]) -> None:
    fill_by_proxy(shell, hidden, calls, FIRST, LAYERS)


def by_fill(shell: BaseShell, hidden: Tensor, calls: list[Any]) -> None:
    fill = KVFill(shell, FIRST)
    fill.prepare()
    fill.fill(hidden, calls, FIRST, LAYERS)


@pytest.mark.parametrize(("rows", "seq"), [(1, 1), (3, 1), (2, 4)])
@torch.no_grad()
def test_every_way_writes_the_same(tiny: PreTrainedModel, rows: int, seq: int) -> None:
    expected = filled(tiny, by_proxy, rows, seq)
    for found, whole in zip(filled(tiny, by_fill, rows, seq), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_recipe_is_recognised_where_it_holds(tiny: PreTrainedModel) -> None:
    fill = KVFill(BaseShell(tiny), FIRST)
    fill.prepare()
    kind = tiny.config.model_type.removesuffix("_text")
    assert fill.is_stacked == (kind in STACKABLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_agrees_within_its_rounding(dtype: torch.dtype) -> None:
    base = build_tiny("qwen3", dtype=dtype)
    fill = KVFill(BaseShell(base), FIRST)
    fill.prepare()
    assert fill.is_stacked
    for found, whole in zip(filled(base, by_fill, 2, 1), filled(base, by_proxy, 2, 1), strict=True):
        torch.testing.assert_close(found, whole, rtol=4e-2, atol=4e-2)


@torch.no_grad()
def test_a_static_cache_is_written_in_place() -> None:
    base = build_tiny("llama")
    expected = filled(base, by_proxy, 2, 1, StaticCache)
    for found, whole in zip(filled(base, by_fill, 2, 1, StaticCache), expected, strict=True):
        torch.testing.assert_close(found, whole)


def in_place(base: Any) -> None:
    with torch.no_grad():
        base.model.layers[2].self_attn.k_proj.weight.mul_(1.5)


def through_data(base: Any) -> None:
    base.model.layers[3].self_attn.v_proj.weight.data += 0.25


def norm_weight(base: Any) -> None:
    with torch.no_grad():
        base.model.layers[3].input_layernorm.weight.add_(0.5)


def by_optimiser(base: Any) -> None:
    optimiser = torch.optim.SGD(base.parameters(), lr=0.5)
    base(prompt(2, 6), labels=prompt(2, 6)).loss.backward()
    optimiser.step()


def replaced(base: Any) -> None:
    old = base.model.layers[2].self_attn
    old.k_proj = nn.Linear(old.k_proj.in_features, old.k_proj.out_features, bias=False)


def with_bias(base: Any) -> None:
    old = base.model.layers[2].self_attn.v_proj
    old.bias = nn.Parameter(torch.ones(old.out_features))


@pytest.mark.parametrize(
    "change", [in_place, through_data, norm_weight, by_optimiser, replaced, with_bias]
)
def test_changed_weights_are_noticed(llama: PreTrainedModel, change: Callable[..., None]) -> None:
    shell = BaseShell(llama)
    fill = KVFill(shell, FIRST)
    fill.prepare()
    change(llama)
    with torch.no_grad():
        fill.prepare()
        assert fill.is_stacked

        def again(shell: BaseShell, hidden: Tensor, calls: list[Any]) -> None:
            fill.fill(hidden, calls, FIRST, LAYERS)

        expected = filled(llama, by_proxy, 2, 1)
        for found, whole in zip(filled(llama, again, 2, 1), expected, strict=True):
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def hooked(base: Any) -> None:
    base.model.layers[2].self_attn.k_proj.register_forward_hook(lambda m, a, out: out * 2)


def patched(base: Any) -> None:
    projection = base.model.layers[2].self_attn.v_proj
    own = projection.forward
    projection.forward = lambda x: own(x) + 1


def adapted(base: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, base)


def subclassed(base: Any) -> None:
    class Scaled(nn.Linear):
        """Such as a quantised layer."""

        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) * 3

    base.model.layers[1].self_attn.v_proj.__class__ = Scaled


def offloaded(base: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(base)


@pytest.mark.parametrize("change", [hooked, patched, adapted, subclassed, offloaded])
def test_layers_that_do_more_are_asked_themselves(
    llama: PreTrainedModel, change: Callable[..., None]
) -> None:
    fill = KVFill(BaseShell(llama), FIRST)
    fill.prepare()
    assert fill.is_stacked
    change(llama)
    with torch.no_grad():
        fill.prepare()
        assert not fill.is_stacked
        expected = filled(llama, by_proxy, 2, 1)
        for found, whole in zip(filled(llama, by_fill, 2, 1), expected, strict=True):
            torch.testing.assert_close(found, whole)


@torch.no_grad()
def test_a_recipe_that_only_looks_alike_is_found_out(llama: PreTrainedModel) -> None:
    attention = llama.model.layers[2].self_attn
    kind = type(attention)

    class Shifted(kind):
        """Attention whose keys are not what its projection says."""

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states + 0.1, *args, **kwargs)

    Shifted.__module__ = kind.__module__
    attention.__class__ = Shifted
    fill = KVFill(BaseShell(llama), FIRST)
    fill.prepare()
    assert not fill.is_stacked


@torch.no_grad()
def test_a_stack_that_would_be_too_large_is_not_made(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked_kv, "MAX_BYTES", 100)
    fill = KVFill(BaseShell(llama), FIRST)
    fill.prepare()
    assert not fill.is_stacked


@torch.no_grad()
def test_exits_use_new_weights_after_training(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    ids = prompt(2, 5)
    values: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    model.generate(ids, **values)
    llama.model.layers[3].self_attn.v_proj.weight.mul_(-2)
    found = model.generate(ids, **values)
    fresh = wrap(llama, {1: "lens"}).generate(ids, **values)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(fresh.logits))


@torch.no_grad()
def test_the_proxy_stops_a_layer_and_passes_questions_on(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    cache = DynamicCache(config=llama.config)
    hidden, calls = shell.prologue(input_ids=prompt(1, 3), **shell.cached(cache))
    proxy = KVOnlyCache(cache)
    assert proxy.get_seq_length() == 0
    touched = []
    hook = llama.model.layers[0].mlp.register_forward_hook(lambda *a: touched.append(1))
    write_layer_kv(llama.model.layers[0], hidden, shell.with_cache(calls[0], proxy))
    hook.remove()
    assert cache.get_seq_length() == 3
    assert not touched
    with pytest.raises(SedacError, match="did not hand its K/V"):
        write_layer_kv(llama.model.layers[0], hidden, shell.with_cache(calls[0], None))
