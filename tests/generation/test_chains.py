"""Modes on bases that hold chains only: the same promises as where drafts are trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.generation.costs import PassCosts
from sedac_hf.generation.cycle import Cycle
from sedac_hf.generation.draft_tree import BLANK, DraftTree
from sedac_hf.generation.exact_loop import ExactLoop
from sedac_hf.generation.governor import Governor
from sedac_hf.generation.governors import Governors
from tests.generation.drafting import padded
from tests.tiny_models import BY_SLOT, LAYERS, build_tiny, prompt
from tests.wrapping import rule, wrap

NEW = 14
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
EXACT: dict[str, Any] = {"sedac_mode": "exact"}


class Eager(Governor):
    """Always drafts as much as it can, whatever this machine's clock says."""

    def __init__(self, has_head: bool) -> None:
        flat = PassCosts({1: 1.0})
        tail = flat if has_head else None
        super().__init__(flat, tail, 0.0, most_nodes=8, most_levels=3, width=1)

    def begin(self) -> Cycle:
        return Cycle(on=True)

    def end(self, *args: Any) -> None:
        pass


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(self: Any, run: Any, starts: Any, depth: Any, state: Any, head: Any) -> Governor:
        return Eager(head is not None)

    monkeypatch.setattr(Governors, "find", find)


@pytest.fixture(params=BY_SLOT)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Bases whose attention goes by slots."""
    return build_tiny(request.param, seed=2)  # with this seed their texts are varied


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kinds", [{-1: "feedback"}, {1: "block"}, {0: "lens"}], ids=str)
def test_greedy_tokens_are_the_bases(
    base: PreTrainedModel, kinds: dict[int, str], rows: int
) -> None:
    model = wrap(base, kinds)
    given = padded(rows)
    expected = base.generate(**given, **GREEDY)
    found = model.generate(**given, **GREEDY, **EXACT, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.drafts["offered"] > 0
    assert found.drafts["reason_without_drafts"] == ""


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("rows", [1, 3])
def test_accepted_drafts_are_the_bases_tokens(
    base: PreTrainedModel, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit sits behind the last layer but one and changes nothing: most drafts are right."""
    model = wrap(base, {LAYERS - 2: "lens"})
    for parameter in model.exit_heads.parameters():
        parameter.data.zero_()
    kept: list[list[int]] = []
    keep = ChainPass.keep

    def noted(self: ChainPass, part: int, length: Any, path: Any, counts: Any) -> None:
        kept.append(counts.tolist())
        keep(self, part, length, path, counts)

    monkeypatch.setattr(ChainPass, "keep", noted)
    given = {**padded(rows), **GREEDY, "max_new_tokens": 40}
    expected = base.generate(**given)
    assert torch.equal(model.generate(**given, **EXACT), expected)
    assert max(max(counts) for counts in kept) > 2
    assert rows == 1 or any(len(set(counts)) > 1 for counts in kept), "rows have parted"


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_seed_gives_the_text_that_it_gives_the_base(base: PreTrainedModel, rows: int) -> None:
    model = wrap(base, {1: "block"})
    values = {**padded(rows), **GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = base.generate(**values)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(**values, **EXACT), expected)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("name", ["bloom", "mpt", "llama4"])  # the others have no static caches
def test_static_caches_serve_too(name: str) -> None:
    base = build_tiny(name, seed=2)
    model = wrap(base, {1: "block"})
    given = {**padded(3), **GREEDY, "cache_implementation": "static"}
    expected = base.generate(**given)
    found = model.generate(**given, **EXACT, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.drafts["accepted"] > 0


@pytest.mark.usefixtures("_eager")
def test_the_cache_that_comes_back_goes_on(base: PreTrainedModel) -> None:
    model = wrap(base, {-1: "feedback", 0: "block"})
    given, cache = padded(2), DynamicCache(config=base.config)
    half = {**GREEDY, "max_new_tokens": 7, "past_key_values": cache}
    first = model.generate(**given, **half, **EXACT)
    assert {int(cache.get_seq_length(i)) for i in range(len(cache.layers))} == {9 + 6}
    mask = torch.cat([given["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
    found = model.generate(first, attention_mask=mask, **half, **EXACT)
    assert torch.equal(found, base.generate(**given, **GREEDY))


@pytest.mark.parametrize("rows", [1, 3])
def test_settled_exits_and_plain_are_as_the_loop_over_modules_has_them(
    base: PreTrainedModel, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {0: "feedback", 1: "block"}
    model = wrap(base, kinds, [rule(layer, 0.0) for layer in kinds], kv_mode="settle")
    ids = prompt(rows, 6)
    risks = model(input_ids=prompt(4, 12, seed=3), exits="simulate").risks.flatten(0, 1)
    levels = risks.nanquantile(0.4, 0).tolist()
    model.set_cascade(CascadeConfig([rule(layer, 2 * level) for layer, level in enumerate(levels)]))
    values = {**GREEDY, "return_dict_in_generate": True, "sedac_mode": "certified"}
    found = model.generate(ids, **values)
    assert model.exit_stats.runs_on == "modules"
    left = found.exit_layers[:, 1:] < LAYERS
    assert left.any()
    assert rows == 1 or not left.all()
    monkeypatch.setattr("sedac_hf.generation.exact.why_not", lambda *args: "told to")
    expected = model.generate(ids, **values)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.exit_layers, expected.exit_layers)


def test_that_drafts_were_chains_is_told_and_why() -> None:
    model = wrap(build_tiny("bloom"), {1: "block"})
    model.generate(**padded(2), **GREEDY, **EXACT)
    drafts = model.exit_stats.drafts
    assert drafts.reason == ""
    assert drafts.chains_reason.startswith("BloomForCausalLM")
    assert model.exit_stats.to_dict()["drafts"]["reason_for_chains"] == drafts.chains_reason
    model = wrap(build_tiny("gpt2"), {1: "block"})
    model.generate(**padded(2), **GREEDY, **EXACT)
    assert model.exit_stats.drafts.chains_reason == ""


def test_the_governor_of_a_chain_expands_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    cycle = ExactLoop.cycle

    def noted(self: ExactLoop) -> None:
        widths.append(self._governor.width)
        cycle(self)

    monkeypatch.setattr(ExactLoop, "cycle", noted)
    for name, width in (("mpt", 1), ("gpt2", 2)):
        widths.clear()
        wrap(build_tiny(name), {1: "block"}).generate(**padded(2), **GREEDY, **EXACT)
        assert set(widths) == {width}


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_is_one_whatever_is_put_up(seed: int) -> None:
    """Offers, continuations, blanks and cuts in any order: each node follows the one before it."""
    random = np.random.default_rng(seed)
    tree = DraftTree(9, limit=6, chain=True)
    if seed % 2:
        tree.offer_path([1, 2, 3, 4], [0.9, 0.6, 0.5, 0.4], 2)
    tree.offer(0, [1, 5, 6], [0.6, 0.3, 0.1])
    for _ in range(6):
        known = len(tree)
        new = tree.take(int(random.integers(1, 4)), known=known if random.random() < 0.5 else None)
        if new and random.random() < 0.7:
            tree.offer(new[-1], random.integers(1, 5, 3).tolist(), [0.5, 0.3, 0.2])
        if random.random() < 0.1:
            tree.pad(len(tree) + 1)
    real = [node for node, origin in enumerate(tree.origins) if origin != BLANK]
    assert real == list(range(len(real))), "blanks come last"
    assert [tree.parents[node] for node in real] == [node - 1 for node in real]
    assert len(real) > 1


def test_a_continuation_goes_on_through_a_node_that_the_head_offered() -> None:
    tree = DraftTree(9, limit=5, chain=True)
    tree.offer(0, [1, 2], [0.6, 0.3])
    tree.offer_path([1, 7, 8], [0.5, 0.45, 0.4], 2)
    tree.take(9)
    assert tree.tokens == [9, 1, 7, 8]
    assert tree.next_scores(3) == []
