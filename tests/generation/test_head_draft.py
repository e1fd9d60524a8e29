"""The head's own cache in exact mode: at every root as if it had read the settled text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.core.exit_cache import previous_states
from sedac_hf.generation.head_draft import HeadDraft
from tests.core.test_module_pass import Whole
from tests.generation.drafting import EXACT, GREEDY, _eager, padded
from tests.native import step_by_step
from tests.tiny_models import WIDTH
from tests.wrapping import wrap

__all__ = ["_eager"]

NEW = 20


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kinds", [{-1: "feedback"}, {1: "feedback"}, {1: "deep"}], ids=str)
def test_roots_are_drafted_from_true_states(
    llama: PreTrainedModel,
    kinds: dict[int, str],
    every: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `every` 3 the head is asked in each third cycle only, and has to catch up."""
    seen: list[tuple[Tensor, Any, Any]] = []
    redo, draft, asked = HeadDraft._redo_and_root, HeadDraft.draft, [0]

    def noted(self: HeadDraft, root: Tensor, alive: Any) -> Tensor:
        states = redo(self, root, alive)
        seen.append((states, self._state.length.copy(), alive.copy()))
        return states

    def sometimes(self: HeadDraft, trees: Any, alive: Any, governor: Any, clock: Any) -> Any:
        asked[0] += 1
        if asked[0] % every:
            return None, []
        return draft(self, trees, alive, governor, clock)

    monkeypatch.setattr(HeadDraft, "_redo_and_root", noted)
    monkeypatch.setattr(HeadDraft, "draft", sometimes)
    model = wrap(llama, kinds)
    values = {**GREEDY, "max_new_tokens": NEW, "eos_token_id": None}
    with step_by_step():
        text = model.generate(**padded(3), **values, **EXACT)
    assert len(seen) > 2
    for states, lengths, alive in seen:
        for row in np.flatnonzero(alive).tolist():
            whole = Whole(model, text[row, row % 4 : int(lengths[row]) + 1])
            given = previous_states(whole.states[-1], torch.zeros(1, 1, WIDTH), None)
            expected = whole.head(0, given)
            torch.testing.assert_close(states[row, 0], expected, rtol=1e-3, atol=1e-3)
