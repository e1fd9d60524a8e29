"""Nodes in slots against the base's own forward of every path, on every architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sedac_hf.core.exit_cache import previous_states
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.row_pass import BASE, Placement
from sedac_hf.errors import CacheError
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, build_tiny, prompt
from tests.wrapping import wrap

IntArray = npt.NDArray[np.int64]

LENGTH = 9  # of the prompt: beyond the windows of the tiny models
PADS = (0, 4)
TREE = (-1, 0, 0, 1, 2, 3)  # parent of each node; -1 is the prompt
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

    def __init__(self, model: SedacForCausalLM, cache: Any = None, length: int = LENGTH) -> None:
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
        self.run = ModulePass(model.assembly.parts)
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


@torch.no_grad()
@pytest.mark.parametrize("parents", [chain(4), TREE], ids=["chain", "tree"])
def test_each_node_is_its_path_alone(tiny: PreTrainedModel, parents: tuple[int, ...]) -> None:
    rows = Rows(wrap(tiny, {1: "lens"}))
    tokens = prompt(2, len(parents), seed=1)
    check_tree(rows, tokens, parents, rows.step(tokens, parents))


@torch.no_grad()
def test_accepted_nodes_are_as_if_never_drafted(tiny: PreTrainedModel) -> None:
    rows = Rows(wrap(tiny, {1: "lens"}))
    tokens = prompt(2, len(TREE), seed=1)
    rows.step(tokens, TREE)
    # Another path and another number of nodes in each row, so that rows part from now on.
    rows.accept(BASE, tokens, np.array([[0, 2, 4], [0, 1, 0]]), np.array([3, 2]))
    for seed in (2, 3):
        tokens = prompt(2, len(TREE), seed=seed)
        check_tree(rows, tokens, TREE, rows.step(tokens, TREE))
        rows.accept(BASE, tokens, np.array([[0, 0, 0, 0], [0, 1, 3, 5]]), np.array([1, 4]))
    one = prompt(2, 1, seed=4)
    check_tree(rows, one, (-1,), rows.step(one, (-1,)))


@torch.no_grad()
def test_nodes_of_later_calls_see_open_nodes_of_earlier_ones(tiny: PreTrainedModel) -> None:
    rows = Rows(wrap(tiny, {1: "lens"}))
    tokens = prompt(2, len(TREE), seed=1)
    found = []
    for level in ((0, 1), (1, 3), (3, 5), (5, 6)):
        at = rows.place(TREE[: level[1]], level[1] - level[0])
        hidden = rows.run.embed(tokens[:, level[0] : level[1]], at.positions)
        found.append(rows.run.layers(hidden, at, 0, 2))
    # The early layers level by level, the others over all nodes together.
    at = rows.place(TREE)
    hidden = rows.run.layers(torch.cat(found, dim=1), at, 2, LAYERS)
    check_tree(rows, tokens, TREE, rows.run.logits(hidden))


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
    rows: Rows, k: int, tokens: Tensor, feedback: Tensor, known: list[Tensor], found: Tensor
) -> None:
    """Every node of a tree against the head on its row's text and its path.

    `known` has the feedback of each row's text.
    """
    for row in range(2):
        for node, seen in enumerate(ancestry(TREE)):
            path = torch.from_numpy(np.flatnonzero(seen))
            whole = Whole(rows.model, torch.cat([rows.texts[row], tokens[row, path]]))
            given = torch.cat([known[row], feedback[row, path]])[None]
            torch.testing.assert_close(found[row, node], whole.head(k, given), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kinds", [{1: "lens", 2: "deep"}, {-1: "feedback", 0: "block"}], ids=str)
def test_heads_draft_trees_on_caches_of_their_own(
    tiny: PreTrainedModel, kinds: dict[int, str]
) -> None:
    rows = Rows(wrap(tiny, kinds))
    zero = torch.zeros(1, 1, WIDTH)
    known = [
        previous_states(Whole(rows.model, text).states[-1], zero, None)[0] for text in rows.texts
    ]
    texts, length = list(rows.texts), rows.length
    for k, head in enumerate(rows.model.exit_heads):
        rows.texts, rows.length = list(texts), length
        own = list(known)
        for seed in (1, 2):
            tokens = prompt(2, len(TREE), seed=seed)
            feedback = torch.randn(2, len(TREE), WIDTH)
            at = rows.place(TREE)
            hidden = rows.run.embed(tokens, at.positions)
            hidden = rows.run.layers(hidden, at, 0, int(head.layer_idx) + 1)
            found = rows.run.head(k, hidden, feedback, at)
            check_head(rows, k, tokens, feedback, own, found)
            path, counts = np.array([[0, 2, 4], [0, 1, 0]]), np.array([3, 2])
            rows.run.keep(BASE, rows.length, path, counts)
            rows.accept(k, tokens, path, counts)
            for row in range(2):
                kept = torch.from_numpy(path[row, : counts[row]])
                own[row] = torch.cat([own[row], feedback[row, kept]])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("length", [5, 7], ids=["within", "beyond"])
def test_what_was_settled_goes_back_into_the_cache(
    tiny: PreTrainedModel, kind: str, length: int
) -> None:
    cache = StaticCache(config=tiny.config, max_cache_len=16) if kind == "static" else None
    rows = Rows(wrap(tiny, {1: "block"}), cache, length)
    tokens = prompt(2, len(TREE), seed=1)
    rows.step(tokens, TREE)
    rows.accept(BASE, tokens, np.array([[0, 2, 4], [0, 1, 3]]), np.array([3, 3]))
    rows.run.store(rows.cache, rows.length)
    assert int(rows.cache.get_seq_length()) == length + 3
    after = prompt(2, 1, seed=2)
    mask = torch.cat([rows.mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    logits = tiny(
        after,
        attention_mask=mask,
        position_ids=mask.cumsum(-1)[:, -1:] - 1,
        past_key_values=rows.cache,
    ).logits
    check_tree(rows, after, (-1,), logits)


@torch.no_grad()
def test_more_than_a_static_cache_holds_is_an_error(llama: PreTrainedModel) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=LENGTH + 1)
    rows = Rows(wrap(llama, {1: "lens"}), cache)
    tokens = prompt(2, 2, seed=1)
    rows.step(tokens, chain(2))
    rows.accept(BASE, tokens, np.array([[0, 1]] * 2), np.array([2, 2]))
    with pytest.raises(CacheError, match="static cache of 10 positions was to take 11"):
        rows.run.store(rows.cache, rows.length)


@torch.no_grad()
def test_storage_grows_without_losing_what_it_holds() -> None:
    base = build_tiny("llama", max_position_embeddings=1024)
    rows = Rows(wrap(base, {1: "lens"}))
    many = torch.randint(3, VOCABULARY, (2, 300))
    rows.step(many, chain(300))
    rows.accept(BASE, many, np.stack([np.arange(300)] * 2), np.array([300, 299]))
    one = prompt(2, 1, seed=2)
    check_tree(rows, one, (-1,), rows.step(one, (-1,)))


def test_a_cache_of_another_kind_is_refused(llama: PreTrainedModel) -> None:
    run = ModulePass(wrap(llama, {1: "lens"}).assembly.parts)
    with pytest.raises(CacheError, match="cache is empty"):
        run.load(DynamicCache(config=llama.config))
    with pytest.raises(CacheError, match="of 4 layers; found DynamicCache with 0 layers"):
        run.load(DynamicCache())
