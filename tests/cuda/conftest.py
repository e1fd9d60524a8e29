"""Fixtures of the checks on a CUDA device: full float32, drafts always made, models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf import SedacForCausalLM
from tests.cuda.device import DEVICE
from tests.generation.drafting import draft_always
from tests.micro_exits import micro_exits
from tests.micro_model import MicroModel
from tests.tiny_models import build_tiny

NAMES = ("llama", "qwen3", "gemma2", "gpt2")


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of float32 in float32; without a device the pass that serves one."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("SEDAC_PASS", "modules")
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are always made, whatever this machine's clock says."""
    draft_always(monkeypatch)


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model on the device, fresh for each test."""
    return build_tiny(request.param).to(DEVICE)


@pytest.fixture(scope="module")
def exiting(micro_model: MicroModel) -> Iterator[SedacForCausalLM]:
    """The micro model with exits that work, on the CPU; tests move copies of it."""
    torch.manual_seed(0)
    yield micro_exits(micro_model)
    assert micro_model.model.device.type == "cpu", "a test moved what others share"
