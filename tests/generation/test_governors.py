"""Costs are measured once for each batch size and head, and heads take turns until one is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.core.module_pass import ModulePass
from sedac_hf.generation import governors as module
from sedac_hf.generation.costs import PassCosts
from sedac_hf.generation.governor import Governor
from sedac_hf.generation.governors import Governors, expected_passes
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import prompt
from tests.wrapping import wrap

VALUES: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of these tests follows the base's own modules."""
    monkeypatch.setenv("SEDAC_PASS", "modules")


class Clock:
    """Advances by what the last pass is said to take."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, per_node: float, layer: float = 0.0
    ) -> None:
        self.now = 0.0
        run, run_layers = ModulePass.logits, ModulePass.layers
        self.passes = 0

        def layers(run_pass: ModulePass, hidden: Tensor, at: Any, *span: int) -> Tensor:
            self.now += layer * (span[1] - span[0])
            return run_layers(run_pass, hidden, at, *span)

        monkeypatch.setattr(ModulePass, "layers", layers)

        def logits(run_pass: ModulePass, hidden: Tensor) -> Tensor:
            self.now += 1.0 + per_node * hidden.shape[1]
            self.passes += 1
            return run(run_pass, hidden)

        monkeypatch.setattr(ModulePass, "logits", logits)

    def __call__(self) -> float:
        return self.now


def governed(
    model: SedacForCausalLM, clock: Clock, monkeypatch: pytest.MonkeyPatch, rows: int = 1
) -> Governor:
    """The governor of a call of `generate`."""
    seen: list[Governor] = []
    find = Governors.find

    def noted(self: Any, run: Any, starts: Any, depth: Any, state: Any, head: Any) -> Governor:
        seen.append(find(self, run, starts, depth, state, head, clock))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Governors, "find", noted)
        model.generate(prompt(rows, 5), **VALUES, sedac_mode="exact")
    return seen[0]


def test_costs_are_measured_at_first_use_only(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(llama, {-1: "feedback"})
    clock = Clock(monkeypatch, 0.01)
    first = governed(model, clock, monkeypatch)
    used = clock.passes
    assert governed(model, clock, monkeypatch) is first
    assert clock.passes - used <= VALUES["max_new_tokens"]
    assert governed(model, clock, monkeypatch, rows=2) is not first
    (one, two) = model.pass_choice().governors.to_dict()
    assert (one["batch"], two["batch"], one["head"]) == (1, 2, 0)
    assert {1, 2, 4, 8, 16} <= set(one["pass_ms"])
    assert one["pass_ms"] == one["tail_ms"]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[int, dict[int, float]]]]:
    """Rows and seconds of each measurement, by first layer and nodes, from now on."""
    taken: list[tuple[int, dict[int, dict[int, float]]]] = []
    measure = module.measure_passes

    def noted(run: Any, state: Any, *args: Any) -> dict[int, PassCosts]:
        found = measure(run, state, *args)
        taken.append((state.rows, {start: costs.to_dict() for start, costs in found.items()}))
        return found

    monkeypatch.setattr(module, "measure_passes", noted)
    return taken


def test_passes_that_will_not_pay_are_not_measured(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, taken: list[Any]
) -> None:
    governed(wrap(llama, {-1: "feedback"}), Clock(monkeypatch, 3.0), monkeypatch)
    assert taken == [(1, {0: {1: 4.0, 2: 7.0, 4: 13.0}})]


def test_one_measurement_serves_all_heads_and_larger_batches(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, taken: list[Any]
) -> None:
    model = wrap(llama, {0: "block", 2: "block"})
    clock = Clock(monkeypatch, 0.01, layer=0.5)
    for rows in [1] * 6 + [4] * 6:
        governed(model, clock, monkeypatch, rows=rows)
    [(rows, seconds)] = taken
    layers = llama.config.num_hidden_layers
    assert rows == 1
    for start in (0, 1, 3):
        expected = {n: 1.0 + 0.01 * n + 0.5 * (layers - start) for n in (1, 2, 4, 8, 16)}
        assert seconds[start] == pytest.approx(expected)
    known = model.pass_choice().governors.to_dict()
    assert {(each["batch"], each["head"]) for each in known} == {(1, 0), (1, 1), (4, 0), (4, 1)}


def test_rows_count_like_nodes() -> None:
    one, many = PassCosts({1: 1.0, 4: 2.0, 16: 3.0}), PassCosts({1: 9.0})
    expected = expected_passes({1: {0: one}, 8: {0: many}}, 4)
    assert expected is not None
    assert expected[0].of_all((1, 2, 4)) == one.of_all((4, 8, 16))
    assert expected_passes({4: {0: one}}, 4) is None


def test_measuring_leaves_no_trace_in_the_text(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(llama, {1: "block"})
    clock = Clock(monkeypatch, 0.01)
    expected = llama.generate(prompt(2, 5), **VALUES)
    for _ in range(2):
        governed(model, clock, monkeypatch, rows=2)
        found = model.generate(prompt(2, 5), **VALUES, sedac_mode="exact")
        assert torch.equal(found, expected)


def test_every_head_is_tried_and_the_fastest_serves(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(llama, {0: "block", 2: "block"})
    clock = Clock(monkeypatch, 0.01)
    governors = model.pass_choice().governors
    served = []
    for _ in range(12):
        served.append(governors.pick_head(1, [0, 2]))
        governed(model, clock, monkeypatch)
    assert set(served) == {0, 1}
    known = governors.to_dict()
    best = max(known, key=lambda each: each["rate_drafting"])
    assert governors.pick_head(1, [0, 2]) == best["head"]
    assert governors.pick_head(1, []) is None


def test_known_hit_rates_and_costs_choose_the_head() -> None:
    governors, near, far = Governors(), [0.3, 0.4, 0.5, 0.6], [0.9] * 4
    assert governors.pick_head(1, [0, 2], [near, far]) == 0  # nothing is known of costs
    passes = {start: PassCosts({n: 10.0 - start for n in (1, 2, 4, 8, 16)}) for start in (0, 1, 3)}
    tails = {start: module._behind_root(passes, start) for start in passes}
    governors._passes[1], governors._tails[1] = passes, tails
    governors._known[1, 0] = Governor(passes[0], tails[1], 1.5)
    assert governors.pick_head(1, [0, 2], [near, far]) == 1
    assert governors.pick_head(1, [0, 2], [near, near]) == 0  # the other runs two layers more
    slightly = [hit + 0.05 for hit in near]
    assert governors.pick_head(1, [0, 2], [near, slightly]) == 0  # which is not worth it
    assert governors.pick_head(2, [0, 2], [near, far]) == 0  # of other batch sizes nothing is known


def test_what_a_pass_takes_from_a_checkpoint_on_has_the_other_nodes_in_it() -> None:
    """The head has run the root through the early layers, and nobody else."""
    passes = {0: PassCosts({1: 10.0, 4: 11.0}), 3: PassCosts({1: 7.0, 4: 8.0})}
    tail = module._behind_root(passes, 3)
    assert (tail.of(1), tail.of(4)) == (7.0, 11.0)
    assert module._behind_root(passes, 0) is passes[0]
