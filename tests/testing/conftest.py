"""A good model with exits on the micro model, fresh for each test that spoils it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sedac_hf.calibration.documents import Document
from sedac_hf.modeling import SedacForCausalLM
from tests.micro_exits import fitted_states, micro_documents, micro_exits
from tests.micro_model import MicroModel


@pytest.fixture(scope="session")
def fitted_exits(micro_model: MicroModel) -> SedacForCausalLM:
    """The good model; nobody changes it."""
    return micro_exits(micro_model)


@pytest.fixture
def exits(fitted_exits: SedacForCausalLM) -> SedacForCausalLM:
    """A copy of the good model."""
    return copy.deepcopy(fitted_exits)


@pytest.fixture(scope="session")
def documents(micro_model: MicroModel) -> list[Document]:
    """Forty new documents."""
    return micro_documents(micro_model.language, 40, seed=900)


@pytest.fixture(scope="session")
def early_states(fitted_exits: SedacForCausalLM, micro_model: MicroModel) -> Tensor:
    """States at the checkpoint, `[tokens, width]`."""
    ids = torch.tensor([d.ids for d in micro_model.language.documents(60, seed=901)])
    with torch.no_grad():
        return fitted_states(fitted_exits, ids)[0]
