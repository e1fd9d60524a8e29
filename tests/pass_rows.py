"""Rows of a pass, and what their nodes are compared with: the base's own forward of each path."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.row_pass import Placement
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, prompt

IntArray = npt.NDArray[np.int64]

LENGTH = 9  # of the prompt: beyond the windows of the tiny models
PADS = (0, 4)
CLOSE: Any = {"rtol": 1e-3, "atol": 2e-4}


def ancestry(parents: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which nodes each node sees, `[nodes, nodes]`."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def chain(nodes: int) -> tuple[int, ...]:
    return tuple(range(-1, nodes - 1))


class Rows:
    """A model, a prompt with padding on the left, and a pass that took the prompt over."""

    def __init__(
        self,
        model: SedacForCausalLM,
        cache: Any = None,
        length: int = LENGTH,
        kind: type[ModulePass] = ModulePass,
    ) -> None:
        self.model = model
        self.ids = prompt(2, length)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, : PADS[1]] = 0
        self.cache = DynamicCache(config=model.base.config) if cache is None else cache
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        model(
            self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.run = kind(model.assembly.parts)
        self.length = self.run.load(self.cache)
        self.first = np.array(PADS)
        self.texts = [self.ids[row, PADS[row] :] for row in range(2)]

    def place(self, parents: tuple[int, ...], nodes: int | None = None) -> Placement:
        """Where the last `nodes` nodes of a tree stand, in both rows."""
        tree = ancestry(parents)
        depth = tree.sum(-1) - 1
        start = 0 if nodes is None else len(parents) - nodes
        positions = (self.length - self.first)[:, None] + depth[None, start:]
        return Placement(self.first, self.length, positions, np.stack([tree[start:]] * 2))

    def step(self, tokens: Tensor, parents: tuple[int, ...]) -> Tensor:
        """Logits of a tree of nodes."""
        at = self.place(parents)
        hidden = self.run.embed(tokens, at.positions)
        return self.run.logits(self.run.layers(hidden, at, 0, LAYERS))

    def accept(self, part: int, tokens: Tensor, path: IntArray, counts: IntArray) -> None:
        """Keep a path of each row."""
        self.run.keep(part, self.length, path, counts)
        self.length = self.length + counts
        for row in range(2):
            kept = tokens[row, torch.from_numpy(path[row, : counts[row]])]
            self.texts[row] = torch.cat([self.texts[row], kept])


def check_tree(rows: Rows, tokens: Tensor, parents: tuple[int, ...], found: Tensor) -> None:
    """Every node against the base's own forward of its row's text and its path."""
    for row in range(2):
        for node, seen in enumerate(ancestry(parents)):
            path = tokens[row, torch.from_numpy(np.flatnonzero(seen))]
            text = torch.cat([rows.texts[row], path])
            expected = rows.model.base(text[None]).logits[0, -1]
            torch.testing.assert_close(found[row, node], expected, **CLOSE)


class Whole:
    """States of whole sequences without a cache: what heads are compared with."""

    def __init__(self, model: SedacForCausalLM, text: Tensor) -> None:
        self.model = model
        hidden, self.calls = model.shell.prologue(input_ids=text[None], use_cache=False)
        self.states = [hidden]
        for i, call in enumerate(self.calls):
            self.states.append(model.shell.layer(i, self.states[-1], call))

    def head(self, k: int, feedback: Tensor) -> Tensor:
        """State that head `k` gives to the last position."""
        head: Any = self.model.exit_heads[k]
        first = self.model.assembly.parts.layout.first_layer[k]
        call = self.calls[head.spec.template_layer]
        given = feedback if head.spec.feedback else None
        return head(self.states[head.layer_idx + 1], call, None, first, given)[0, -1]


def check_head(
    rows: Rows,
    k: int,
    tokens: Tensor,
    feedback: Tensor,
    known: list[Tensor],
    found: Tensor,
    parents: tuple[int, ...],
) -> None:
    """Every node of a tree against the head on its row's text and its path.

    `known` has the feedback of each row's text.
    """
    for row in range(2):
        for node, seen in enumerate(ancestry(parents)):
            path = torch.from_numpy(np.flatnonzero(seen))
            whole = Whole(rows.model, torch.cat([rows.texts[row], tokens[row, path]]))
            given = torch.cat([known[row], feedback[row, path]])[None]
            torch.testing.assert_close(found[row, node], whole.head(k, given), **CLOSE)
