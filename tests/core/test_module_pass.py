"""Nodes in slots against the base's own forward of every path, on every architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sedac_hf.core.exit_cache import previous_states
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.row_pass import BASE
from sedac_hf.errors import CacheError
from tests.pass_rows import LENGTH, Rows, Whole, chain, check_head, check_tree
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, build_tiny, prompt
from tests.wrapping import wrap

TREE = (-1, 0, 0, 1, 2, 3)  # parent of each node; -1 is the prompt


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
            check_head(rows, k, tokens, feedback, own, found, TREE)
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
