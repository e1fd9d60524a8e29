"""What tests of exact mode share: a governor that always drafts, exits that know the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from sedac_hf.config import CheckpointSpec
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.generation.costs import PassCosts
from sedac_hf.generation.cycle import Cycle
from sedac_hf.generation.governor import Governor
from sedac_hf.generation.governors import Governors
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, prompt

NEW = 14
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
EXACT: dict[str, Any] = {"sedac_mode": "exact"}


class Eager(Governor):
    """Always drafts as much as it can, whatever this machine's clock says."""

    def __init__(self, has_head: bool) -> None:
        flat = PassCosts({1: 1.0})
        super().__init__(flat, flat if has_head else None, 0.0, most_nodes=8, most_levels=2)

    def begin(self) -> Cycle:
        return Cycle(on=True)

    def end(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the base's own modules; tests of the native pass have files of their own."""
    monkeypatch.setenv("SEDAC_PASS", "modules")


def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every governor be an eager one."""

    def find(self: Any, run: Any, starts: Any, depth: Any, state: Any, head: Any) -> Governor:
        return Eager(head is not None)

    monkeypatch.setattr(Governors, "find", find)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)


def padded(rows: int, length: int = 9) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left; some repeat themselves."""
    ids = prompt(rows, length)
    ids[:, length - 4 :] = ids[:, length - 8 : length - 4]
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def knowing(base: PreTrainedModel, noise: float = 0.0) -> SedacForCausalLM:
    """A model whose exit knows the base's last layer, and so drafts what the base will say."""
    model = SedacForCausalLM.from_base(base, [CheckpointSpec(LAYERS - 2)], self_check=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each verification from now on."""
    seen: list[int] = []
    run = ModulePass.logits

    def counted(self: ModulePass, hidden: Tensor) -> Tensor:
        seen.append(int(hidden.shape[1]))
        return run(self, hidden)

    monkeypatch.setattr(ModulePass, "logits", counted)
    return seen
