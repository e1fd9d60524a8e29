"""Final exits act as long as they save time, and only then."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from sedac_hf.calibration.pareto import Policy
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.generation.core_cycles import CoreCycles
from sedac_hf.generation.exit_governor import (
    BLOCK,
    ExitGovernor,
    ExitGovernors,
    exits_always_act,
    is_governed,
)
from sedac_hf.generation.open_nodes import HeadQueue
from tests.calibration.test_certificate import certificate, rung
from tests.generation.test_settled import GIVEN, prompts, settled
from tests.native import step_by_step

LONG = GIVEN | {"max_new_tokens": 6 * BLOCK + 1}


def run(governor, blocks, with_exits, without):
    """What the governor says over some blocks whose steps take these times."""
    said = []
    for _ in range(blocks):
        acts = governor.begin()
        said.append(acts)
        governor.end(acts, BLOCK, BLOCK * (with_exits if acts else without))
    return said


def test_exits_that_should_not_pay_are_tried_later(monkeypatch):
    said = run(ExitGovernor(1.13), 2000, with_exits=1.2, without=1.0)
    assert not any(said[:31])
    assert any(said)
    assert sum(said) < 0.02 * len(said)
    pays = run(ExitGovernor(1.13), 200, with_exits=0.8, without=1.0)
    assert sum(pays[100:]) > 90
    assert run(ExitGovernor(0.9), 5, with_exits=1.2, without=1.0)[:4] == [False, True, False, True]


class Scripted:
    """Says what it is told to, and notes what it is told."""

    def __init__(self, script):
        self.script, self.seen, self.ended = list(script), [], []

    def begin(self):
        self.seen.append(self.script[len(self.seen) % len(self.script)])
        return self.seen[-1]

    def end(self, acts, steps, seconds):
        if steps:
            self.ended.append((acts, steps, seconds))

    def to_dict(self):
        return {"blocks": len(self.seen)}


def scripted(model, script, monkeypatch):
    governor = Scripted(script)
    monkeypatch.setenv("SEDAC_GOVERNOR", "on")
    monkeypatch.setattr(ExitGovernors, "find", lambda self, rows, rules, expected=None: governor)
    return governor


def test_exits_that_cost_time_are_turned_off_and_tried_seldom():
    said = run(ExitGovernor(), 1000, with_exits=1.03, without=1.0)
    assert sum(said[:5]) == 2
    assert sum(said[5:]) < 0.03 * 995
    assert any(said[100:])


def test_exits_that_save_time_stay_on_and_are_compared_now_and_then():
    said = run(ExitGovernor(), 400, with_exits=0.9, without=1.0)
    assert 0.95 < sum(said[5:]) / 395 < 1


def test_the_governor_changes_its_mind_when_text_does():
    governor = ExitGovernor()
    run(governor, 50, with_exits=1.1, without=1.0)
    assert not governor.to_dict()["acting"]
    assert sum(run(governor, 400, with_exits=0.8, without=1.0)[300:]) > 90
    assert sum(run(governor, 600, with_exits=1.2, without=1.0)[500:]) < 15


def test_one_hiccup_decides_nothing():
    governor = ExitGovernor()
    run(governor, 40, with_exits=0.9, without=1.0)
    while not governor.begin():
        governor.end(False, BLOCK, BLOCK)
    governor.end(True, BLOCK, 1000 * BLOCK)
    run(governor, 30, with_exits=0.9, without=1.0)
    assert governor.pays


def test_new_rules_and_other_batch_sizes_begin_anew():
    rules, others = (CascadeConfig([LayerConfig(1, threshold)]) for threshold in (1.0, 2.0))
    governors = ExitGovernors()
    first = governors.find(1, rules)
    assert governors.find(1, rules) is first
    assert governors.find(2, rules) is not first
    assert governors.find(1, others) is not first


@pytest.mark.parametrize(("value", "expected"), [("off", False), ("0", False), ("", True)])
def test_the_environment_can_leave_exits_alone(value, expected, monkeypatch):
    monkeypatch.setenv("SEDAC_GOVERNOR", value)
    assert is_governed() is expected
    with exits_always_act():
        assert not is_governed()
    assert is_governed() is expected


@pytest.mark.parametrize("kind", ["lens", "block", "feedback"])
def test_without_exits_the_text_is_that_of_plain(kind, monkeypatch):
    model, ids = settled(kind), prompts()
    plain = model.generate(ids, sedac_mode="plain", **LONG)
    scripted(model, [False], monkeypatch)
    model.exit_stats.reset()
    assert torch.equal(model.generate(ids, sedac_mode="certified", **LONG), plain)
    assert model.exit_stats.exit_share == 0


def test_exits_act_in_their_blocks_only_and_leave_the_keys_of_the_base(monkeypatch):
    model, ids = settled(), prompts(1)
    governor = scripted(model, [True, False, False], monkeypatch)
    cache = DynamicCache(config=model.base.config)
    out = model.generate(
        ids, past_key_values=cache, return_dict_in_generate=True, sedac_mode="certified", **LONG
    )
    left = (out.exit_layers[0, 1:] < 4).reshape(-1, BLOCK).any(dim=1)
    assert left.tolist() == [True, False, False, True, False, False]
    assert sum(steps for _, steps, _ in governor.ended) == LONG["max_new_tokens"] - 1
    own = DynamicCache(config=model.base.config)
    with torch.no_grad():
        model.base(out.sequences[:, :-1], past_key_values=own)
    for found, expected in zip(out.past_key_values.layers, own.layers, strict=False):
        torch.testing.assert_close(found.keys, expected.keys)
        torch.testing.assert_close(found.values, expected.values)


def test_rows_and_heads_go_on_as_if_nothing_had_been_between(monkeypatch):
    """A block of exits behind one without asks heads that have followed all along."""
    model, ids = settled("feedback"), prompts(3)
    scripted(model, [False, True], monkeypatch)
    together = model.generate(ids, sedac_mode="certified", return_dict_in_generate=True, **LONG)
    assert bool((together.exit_layers < 4).any())
    for row in range(3):
        alone = model.generate(ids[row : row + 1], sedac_mode="certified", **LONG)
        assert torch.equal(alone[0], together.sequences[row])


@pytest.mark.parametrize("kind", ["block", "feedback"])
def test_exits_do_not_depend_on_how_long_heads_wait_for_positions(kind, monkeypatch):
    model, ids, found = settled(kind), prompts(2), []
    filled, fill = [], HeadQueue.fill
    monkeypatch.setattr(
        HeadQueue, "fill", lambda self, *count: (filled.append(len(self)), fill(self, *count))
    )
    for longest, many in ((1, 100), (5, 2), (512, 1), (512, 100)):
        monkeypatch.setattr("sedac_hf.generation.settle_loop._MAX_QUEUE", longest)
        monkeypatch.setattr("sedac_hf.generation.open_nodes._MANY", many)
        scripted(model, [True, False, False, True, False, True], monkeypatch)
        model.exit_stats.reset()
        text = model.generate(ids, sedac_mode="certified", **LONG)
        found.append((text.tolist(), model.exit_stats.exits_by_layer, max(filled, default=0)))
        filled.clear()
    assert sum(found[0][1].values()) > 0
    assert all(each[:2] == found[0][:2] for each in found)
    waited = [each[2] for each in found]
    assert 0 < waited[0] < waited[1] < BLOCK < waited[2]
    assert waited[3] == 0


def test_what_the_governor_found_is_told(monkeypatch):
    model = settled()
    assert "governor" not in model.exit_stats.to_dict()
    monkeypatch.setenv("SEDAC_GOVERNOR", "on")
    model.generate(prompts(1), sedac_mode="certified", **LONG)
    found = model.exit_stats.to_dict()["governor"]
    assert found["blocks"] == 6
    assert found["step_ms_with_exits"] > 0
    assert found["step_ms_without"] > 0


@pytest.mark.parametrize(("cost", "tried"), [(1.13, False), (0.9, True)])
def test_a_policy_that_should_not_pay_does_not_begin_a_text(cost, tried, monkeypatch):
    model = settled()
    rules = model.cascade
    policy = Policy(rules, estimated_delta=0.005, exit_share=0.1, cost=cost)
    model.certificate = certificate(
        0.01, accepted=1, walk=(replace(rung(0.01, 0.1), policy=policy),)
    )
    monkeypatch.setenv("SEDAC_GOVERNOR", "on")
    model.generate(prompts(1), sedac_mode="certified", **LONG)
    assert (model.exit_stats.to_dict()["governor"]["blocks_with_exits"] > 0) is tried


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["block", "feedback"])
def test_steps_without_exits_are_whole_calls_of_the_core(kind, rows, monkeypatch):
    calls, core = [], CoreCycles.run

    def counted(self, *args, **values):
        outcomes = core(self, *args, **values)
        calls.extend(outcomes)
        return outcomes

    monkeypatch.setattr(CoreCycles, "run", counted)
    script = [True, False, False, True, False, True]
    model, ids = settled(kind, (-1, 0, 2)), prompts(rows)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    ends = model.base_lm.generate(ids, attention_mask=mask, **LONG)[0, ids.shape[1] + 20].item()
    for end in (None, ends):
        for by_steps in (False, True):
            governor = scripted(model, script, monkeypatch)
            model.exit_stats.reset()
            with step_by_step() if by_steps else nullcontext():
                text = model.generate(
                    ids, attention_mask=mask, sedac_mode="certified",
                    **(LONG | {"eos_token_id": end, "pad_token_id": 0}),
                )  # fmt: skip
            stats = model.exit_stats.to_dict()
            stats.pop("governor", None)
            found.append((text.tolist(), stats))
            assert len(governor.seen) > 1
            assert model.exit_stats.exit_share > 0
            # Those behind a step that left somebody open catch up with it first.
            expected = 0 if by_steps else sum(not acts for acts in governor.seen[:6]) * (BLOCK - 1)
            assert len(calls) >= expected if end is None else bool(calls) != by_steps
            calls.clear()
        assert found[-1] == found[-2]
