"""What checks on a CUDA device share; `SEDAC_TEST_DEVICE=cpu` tries them where there is none."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from sedac_hf import SedacForCausalLM
from sedac_hf.evaluation.arms import Batch, make_batches
from tests.micro_model import MicroModel

DEVICE = torch.device(os.environ.get("SEDAC_TEST_DEVICE", "cuda"))
needs_device = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)
ROWS = (1, 4)
GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
LONG: dict[str, Any] = {**GREEDY, "max_new_tokens": 32}


def moved(model: SedacForCausalLM, **values: Any) -> SedacForCausalLM:
    """A copy on the device, some fields of its configuration changed."""
    found = copy.deepcopy(model).to(DEVICE)
    for name, value in values.items():
        setattr(found.config, name, value)
    return found


def on(given: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same arguments on a device."""
    return {name: value.to(device) for name, value in given.items()}


def micro_batch(micro: MicroModel, rows: int, seed: int) -> Batch:
    """Beginnings of documents of the micro language, padded on the left, on the CPU."""
    drawn = micro.language.documents(rows, seed=seed, length=24)
    (batch,) = make_batches([d.ids[: 20 - 3 * (i % 4)] for i, d in enumerate(drawn)], rows, pad=0)
    return batch


def micro_prompts(micro: MicroModel, rows: int) -> dict[str, Tensor]:
    """The same as arguments of `generate`."""
    batch = micro_batch(micro, rows, seed=91)
    return {"input_ids": batch.ids, "attention_mask": batch.mask}


def assert_lives_there(module: torch.nn.Module) -> None:
    """Every parameter and buffer is on the device."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert tensors
    assert {name for name, value in tensors.items() if value.device.type != DEVICE.type} == set()
