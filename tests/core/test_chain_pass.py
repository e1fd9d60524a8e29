"""Chains under the base's own mask against its own forward, rows that part and meet again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.exit_cache import previous_states
from sedac_hf.core.row_pass import BASE
from sedac_hf.errors import SedacError
from tests.pass_rows import Rows, Whole, chain, check_head, check_tree
from tests.tiny_models import ARCHITECTURES, BY_SLOT, LAYERS, WIDTH, build_tiny, prompt
from tests.wrapping import wrap

NODES = 5
FIRST = np.arange(NODES)  # the beginning of a chain


@pytest.fixture(params=(*BY_SLOT, *ARCHITECTURES))
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Bases that hold chains only, and the others, which could hold more."""
    return build_tiny(request.param)


@torch.no_grad()
def test_rows_part_and_meet_again(base: PreTrainedModel) -> None:
    rows = Rows(wrap(base, {1: "lens"}), kind=ChainPass)
    for seed, counts in enumerate(([5, 1], [1, 2], [1, 5], [0, 3], [2, 1])):
        tokens = prompt(2, NODES, seed=seed)
        check_tree(rows, tokens, chain(NODES), rows.step(tokens, chain(NODES)))
        rows.accept(BASE, tokens, np.stack([FIRST] * 2), np.array(counts))
    one = prompt(2, 1, seed=9)
    check_tree(rows, one, (-1,), rows.step(one, (-1,)))


@torch.no_grad()
def test_nodes_of_later_calls_see_open_nodes_of_earlier_ones(base: PreTrainedModel) -> None:
    rows = Rows(wrap(base, {1: "lens"}), kind=ChainPass)
    first = prompt(2, NODES, seed=1)
    rows.step(first, chain(NODES))
    rows.accept(BASE, first, np.stack([FIRST] * 2), np.array([1, 4]))
    tokens, found = prompt(2, NODES, seed=2), []
    for start, stop in ((0, 1), (1, 3), (3, NODES)):
        at = rows.place(chain(stop), stop - start)
        hidden = rows.run.embed(tokens[:, start:stop], at.positions)
        found.append(rows.run.layers(hidden, at, 0, 2))
    # The early layers level by level, the others over all nodes together.
    at = rows.place(chain(NODES))
    hidden = rows.run.layers(torch.cat(found, dim=1), at, 2, LAYERS)
    check_tree(rows, tokens, chain(NODES), rows.run.logits(hidden))


@torch.no_grad()
@pytest.mark.parametrize("kinds", [{1: "lens", 2: "deep"}, {-1: "feedback", 0: "block"}], ids=str)
def test_heads_draft_chains_on_caches_of_their_own(
    base: PreTrainedModel, kinds: dict[int, str]
) -> None:
    rows = Rows(wrap(base, kinds), kind=ChainPass)
    zero = torch.zeros(1, 1, WIDTH)
    known = [
        previous_states(Whole(rows.model, text).states[-1], zero, None)[0] for text in rows.texts
    ]
    texts, length = list(rows.texts), rows.length
    for k, head in enumerate(rows.model.exit_heads):
        rows.texts, rows.length = list(texts), length
        own = list(known)
        for seed, counts in ((1, [3, 1]), (2, [1, 4]), (3, [1, 1])):
            tokens, feedback = prompt(2, NODES, seed=seed), torch.randn(2, NODES, WIDTH)
            at = rows.place(chain(NODES))
            hidden = rows.run.embed(tokens, at.positions)
            hidden = rows.run.layers(hidden, at, 0, int(head.layer_idx) + 1)
            found = rows.run.head(k, hidden, feedback, at)
            check_head(rows, k, tokens, feedback, own, found, chain(NODES))
            rows.accept(k, tokens, np.stack([FIRST] * 2), np.array(counts))
            own = [torch.cat([own[row], feedback[row, : counts[row]]]) for row in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_was_settled_goes_back_into_the_cache(base: PreTrainedModel, kind: str) -> None:
    own_mask = type(base).__name__.startswith(("Bloom", "Falcon", "GPTNeoFor"))
    if kind == "static" and own_mask:
        pytest.skip("the base itself takes no mask shorter than a static cache")
    cache = StaticCache(config=base.config, max_cache_len=24) if kind == "static" else None
    rows = Rows(wrap(base, {1: "block"}), cache, 7, ChainPass)
    for seed, counts in ((1, [5, 1]), (2, [1, 5])):  # apart on the way, level in the end
        tokens = prompt(2, NODES, seed=seed)
        rows.step(tokens, chain(NODES))
        rows.accept(BASE, tokens, np.stack([FIRST] * 2), np.array(counts))
    rows.run.store(rows.cache, rows.length)
    assert int(rows.cache.get_seq_length()) == 7 + 6
    after = prompt(2, 1, seed=3)
    mask = torch.cat([rows.mask, torch.ones(2, 7, dtype=torch.long)], dim=1)
    logits = rows.model(
        after,
        attention_mask=mask,
        position_ids=mask.cumsum(-1)[:, -1:] - 1,
        past_key_values=rows.cache,
        exits="off",
    ).logits
    check_tree(rows, after, (-1,), logits)


def test_a_tree_is_refused() -> None:
    with torch.no_grad():
        rows = Rows(wrap(build_tiny("bloom"), {1: "lens"}), kind=ChainPass)
        tokens = prompt(2, 3, seed=1)
        rows.step(tokens, chain(3))
        with pytest.raises(SedacError, match="holds chains only"):
            rows.accept(BASE, tokens, np.array([[0, 2]] * 2), np.array([2, 2]))
