"""Sizes of the work of `fit` on a CPU and on accelerators of any memory."""

from __future__ import annotations

import torch

from sedac_hf.calibration.work_sizes import WorkSizes, fast_products, most_logits
from tests.tiny_models import build_tiny


def test_a_cpu_takes_many_small_steps() -> None:
    sizes = WorkSizes.of(build_tiny("llama"))
    assert sizes == WorkSizes()
    assert sizes.step_tokens < WorkSizes.for_memory(1 << 36, build_tiny("llama")).step_tokens


def test_more_memory_is_used_up_to_a_bound() -> None:
    base = build_tiny("llama")
    found = [WorkSizes.for_memory(1 << power, base) for power in (20, 26, 30, 34, 37)]
    for name in ("rows", "record_tokens", "step_tokens", "cache_bytes"):
        values = [getattr(sizes, name) for sizes in found]
        assert values == sorted(values)
    assert found[0].rows == 16
    assert found[-1].rows == 1024
    assert found[-1].step_tokens == 8192
    assert found[-1].cache_bytes < 1 << 37


def test_a_larger_base_writes_fewer_rows_at_once() -> None:
    base = build_tiny("llama")
    before = WorkSizes.for_memory(1 << 26, base)
    base.config.num_hidden_layers *= 64
    assert WorkSizes.for_memory(1 << 26, base).rows < before.rows


def test_precision_of_products_is_what_it_was_afterwards() -> None:
    before = torch.get_float32_matmul_precision()
    with fast_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


def test_logits_held_at_once_are_bounded_on_a_cpu() -> None:
    assert most_logits(torch.device("cpu")) * 4 <= 1 << 27
