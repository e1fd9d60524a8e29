"""Batches of prompts, and the ways to continue them that a benchmark compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["Arm", "Batch", "base_arm", "make_batches", "mode_arm", "on_modules"]


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together, padded on the left.

    Attributes:
        index: Which batch it is.
        ids: Token ids `[rows, length]`.
        mask: 1 for tokens, 0 for padding, same shape.
    """

    index: int
    ids: Tensor
    mask: Tensor

    @property
    def device(self) -> torch.device:
        """The device it lies on."""
        return self.ids.device

    def row(self, text: Tensor, row: int, stop: int) -> Tensor:
        """A row of a text that continues this batch, without its padding.

        Args:
            text: Token ids `[rows, longer]`.
            row: Which row.
            stop: Where the text is cut off.

        Returns:
            Token ids `[1, tokens]`.
        """
        first = int(self.mask[row].argmax())
        return text[row : row + 1, first:stop]


def make_batches(
    prompts: Sequence[Sequence[int]], rows: int, *, pad: int, device: torch.device | str = "cpu"
) -> list[Batch]:
    """Put prompts together, in order; those that fill no batch are left out.

    Args:
        prompts: Token ids of each prompt.
        rows: Prompts of a batch; with fewer prompts than that, they are repeated.
        pad: Token that stands where there is none.
        device: Where the batches shall lie.

    Returns:
        At least one batch.

    Raises:
        CalibrationError: If there are no prompts, or one has no tokens.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        empty = sum(not len(prompt) for prompt in prompts)
        raise CalibrationError(
            f"expected at least one prompt and none without tokens, found {len(prompts)} prompts, "
            f"{empty} of them empty."
        )
    batches = []
    for index in range(max(1, len(prompts) // rows)):
        chosen = [prompts[(index * rows + row) % len(prompts)] for row in range(rows)]
        length = max(map(len, chosen))
        ids = torch.tensor([[pad] * (length - len(one)) + list(one) for one in chosen])
        mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in chosen])
        batches.append(Batch(index, ids.to(device), mask.to(device)))
    return batches


class Arm:
    """A way to continue batches that remembers what it wrote last.

    Attributes:
        texts: The latest text by index of the batch, `[rows, length + new]`.
    """

    def __init__(self, write: Callable[[Batch], Tensor]) -> None:
        """Wrap a way to write.

        Args:
            write: Continues a batch and returns the whole text.
        """
        self._write = write
        self.texts: dict[int, Tensor] = {}

    def __call__(self, batch: Batch) -> None:
        """Continue a batch."""
        self.texts[batch.index] = self._write(batch)

    def new_tokens(self, batch: Batch) -> int:
        """Tokens that the latest text of a batch has in each row beyond the prompt."""
        return int(self.texts[batch.index].shape[1] - batch.ids.shape[1])


def base_arm(model: SedacForCausalLM, settings: dict[str, Any], **extra: Any) -> Arm:
    """The base's own `generate`.

    Args:
        model: The wrapped model.
        settings: Arguments of `generate`.
        **extra: More of them.
    """
    generate: Callable[..., Tensor] = model.base_lm.generate
    return Arm(
        lambda batch: generate(input_ids=batch.ids, attention_mask=batch.mask, **settings, **extra)
    )


def mode_arm(
    model: SedacForCausalLM, mode: str, settings: dict[str, Any], *, native: bool = True
) -> Arm:
    """`generate` of the wrapped model in a mode.

    Args:
        model: The wrapped model.
        mode: The mode.
        settings: Arguments of `generate`.
        native: Whether the native pass may serve; else the base's own modules do.
    """
    generate: Callable[..., Tensor] = model.generate

    def write(batch: Batch) -> Tensor:
        with nullcontext() if native else model.native_disabled():
            return generate(
                input_ids=batch.ids, attention_mask=batch.mask, sedac_mode=mode, **settings
            )

    return Arm(write)


def on_modules(mode: str) -> str:
    """The name of the arm that runs a mode on the base's own modules.

    Args:
        mode: The mode.
    """
    return f"{mode} (modules)"
