"""What all tests share: quiet, single-threaded, seeded; tiny models; the micro model."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tests.micro_model import micro_model as micro_model
from tests.tiny_models import ARCHITECTURES, build_tiny

logging.set_verbosity_error()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exits_act(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tokens leave must not depend on the clock; tests of the governor turn it on."""
    monkeypatch.setenv("SEDAC_GOVERNOR", "off")


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model of each architecture in turn, fresh for each test."""
    return build_tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny random Llama, fresh for each test."""
    return build_tiny("llama")
