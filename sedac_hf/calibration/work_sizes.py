"""How much of the work of `fit` is done at a time: what fills the device that does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sedac_hf.core.support import head_dim_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WorkSizes", "fast_products", "most_logits"]

_FLOAT = 4
_TEXT_LENGTH = 256  # tokens that a row of the writer may come to
_LOGITS_KEPT = 4  # copies of a step's logits that training holds at once


@dataclass(frozen=True)
class WorkSizes:
    """Sizes of one batch in each stage of `fit`.

    Attributes:
        rows: Texts that the base writes together.
        record_tokens: Tokens of one forward of the base, padding included.
        step_tokens: Tokens of one training step of a head. On a CPU many small steps teach most;
            where a step costs its launches, as on a GPU, small ones would leave the device idle.
        cache_bytes: Bytes of recorded states kept on the device.
    """

    rows: int = 64
    record_tokens: int = 4096
    step_tokens: int = 512
    cache_bytes: int = 1 << 28

    @classmethod
    def of(cls, base: PreTrainedModel) -> WorkSizes:
        """The sizes for a base where it is.

        Args:
            base: The base, loaded and placed.
        """
        device = base.device
        if device.type == "cuda":
            return cls.for_memory(torch.cuda.mem_get_info(device)[0], base)
        return cls() if device.type == "cpu" else cls.for_memory(1 << 32, base)

    @classmethod
    def for_memory(cls, free: int, base: PreTrainedModel) -> WorkSizes:
        """The sizes for an accelerator.

        Args:
            free: Bytes that are free on it beside the base's weights.
            base: The base, whose vocabulary and K/V decide what a token takes.
        """
        config = base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * head_dim_of(config) * base.dtype.itemsize
        step = _FLOAT * config.vocab_size * _LOGITS_KEPT
        return cls(
            rows=_within(free // 4 // (_TEXT_LENGTH * token), 16, 1024),
            # What a layer holds for a token is a small multiple of its width.
            record_tokens=_within(free // 4 // (64 * _FLOAT * config.hidden_size), 4096, 65_536),
            step_tokens=_within(free // 8 // step, 512, 8192),
            cache_bytes=max(free // 3, cls.cache_bytes),
        )


def most_logits(device: torch.device) -> int:
    """Most logits to hold at once: 128 MB of them in float32, on a GPU a 64th of its memory."""
    if device.type != "cuda":
        return 32_000_000
    memory = torch.cuda.get_device_properties(device).total_memory
    return _within(memory // 64 // _FLOAT, 32_000_000, 512_000_000)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Inside the block float32 products may use a GPU's TF32 units; training does not mind."""
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _within(wanted: int, least: int, most: int) -> int:
    return max(least, min(int(wanted), most))
