"""Whole cycles in the core: the same drafts, paths and texts as step by step in Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from sedac_hf.core.native_rotary import RotaryTables
from sedac_hf.core.session import ExitSession, StepRecord
from sedac_hf.generation.core_cycles import CoreCycles
from sedac_hf.generation.costs import PassCosts
from sedac_hf.generation.cycle import Cycle
from sedac_hf.generation.governor import Governor
from sedac_hf.generation.governors import Governors
from sedac_hf.modeling import SedacForCausalLM
from tests.generation.drafting import padded
from tests.micro_model import MicroModel
from tests.native import step_by_step
from tests.tiny_models import build_tiny
from tests.wrapping import spec_of, wrap

GIVEN: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


class Fixed(Governor):
    """Its numbers stay as they are; notes what every cycle did. Each third cycle asks no head."""

    def __init__(self, has_head: bool, rows: int, seen: list[Any]) -> None:
        costs = PassCosts({1: 1.0, 4: 1.0, 16: 1.6})
        super().__init__(
            costs, costs if has_head else None, 0.01, most_nodes=8, most_levels=3, rows=rows
        )
        self._seen = seen
        self._begun = 0

    def alike(self, most: int) -> int:
        return min(most, max(2 - self._begun % 3, 1))

    def begin(self) -> Cycle:
        self._begun += 1
        return Cycle(on=self._begun % 3 > 0)

    def end(self, cycle: Cycle, trees: Any, paths: Any) -> None:
        grown = [
            (tree.tokens, tree.parents, tree.origins, tree.depths, tree.expanded, tree.matched)
            for tree in trees
        ]
        counts = (cycle.nodes, cycle.drafted, len(cycle.levels), cycle.rows, cycle.tokens)
        scores = [tree.scores for tree in trees]
        self._seen.append((grown, scores, list(map(list, paths)), counts, cycle.gain))


@pytest.fixture
def cycles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every cycle of exact mode did, from now on."""
    seen: list[Any] = []

    def find(self: Any, run: Any, starts: Any, depth: Any, state: Any, head: Any) -> Governor:
        return Fixed(head is not None, state.rows, seen)

    monkeypatch.setattr(Governors, "find", find)
    return seen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each whole cycle in the core, from now on."""
    rows: list[int] = []
    run = CoreCycles.run

    def counted(self: CoreCycles, *args: Any, **values: Any) -> Any:
        outcomes = run(self, *args, **values)
        rows.extend(len(outcome.rows) for outcome in outcomes)
        return outcomes

    monkeypatch.setattr(CoreCycles, "run", counted)
    return rows


def fair(
    base: PreTrainedModel, layer: int, kind: str, noise: float = 0.05, **values: Any
) -> SedacForCausalLM:
    """A model whose exit is right now and then."""
    model = SedacForCausalLM.from_base(base, [spec_of(layer, kind)], self_check=False, **values)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            extra = torch.randn(parameter.shape, generator=generator) * noise
            parameter.add_(extra.to(parameter.dtype))
    return model


def both_ways(
    generate: Callable[[], Tensor], cycles: list[Any], calls: list[int]
) -> tuple[list[Any], list[Any]]:
    """Every cycle in the core and step by step; texts are found equal."""
    found = generate()
    in_core, cycles[:] = list(cycles), []
    assert calls, "the core has run the cycles"
    calls.clear()
    with step_by_step():
        expected = generate()
    assert not calls
    assert torch.equal(found, expected)
    by_steps, cycles[:] = list(cycles), []
    return in_core, by_steps


def ending(model: SedacForCausalLM, given: dict[str, Tensor]) -> list[int]:
    """Tokens at which the rows end one after the other."""
    length = given["input_ids"].shape[1]
    whole = model.base_lm.generate(**given, **GIVEN, eos_token_id=None)[:, length:]
    firsts = set(whole[:, 0].tolist())
    new = [
        [token for at, token in enumerate(row) if at > 1 and token not in {*row[:at], *firsts}]
        for row in whole.tolist()
    ]
    return [tokens[0] for tokens in new if tokens][: len(whole) // 2 + 1]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("layer", "kind"), [(-1, "feedback"), (-1, "block"), (1, "feedback"), (2, "deep")]
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_the_core_drafts_and_accepts_what_the_loop_does(
    architecture: str, layer: int, kind: str, rows: int, cycles: list[Any], calls: list[int]
) -> None:
    model, given = fair(build_tiny(architecture), layer, kind), padded(rows)
    drafted = 0
    for ends in (None, ending(model, given) or None):
        generate = partial(model.generate, **given, **GIVEN, eos_token_id=ends, sedac_mode="exact")
        in_core, by_steps = both_ways(generate, cycles, calls)
        assert in_core == by_steps
        drafted += sum(counts[1] for *_, counts, _ in in_core)
        sizes = {counts[3] for *_, counts, _ in in_core}
    assert drafted > 2
    assert rows == 1 or len(sizes) > 1, "rows have ended at different times"


@pytest.mark.parametrize("rows", [1, 4])
def test_drafts_of_the_micro_model_are_the_same(
    rows: int, micro_model: MicroModel, cycles: list[Any], calls: list[int]
) -> None:
    base = micro_model.model
    layers = base.config.num_hidden_layers
    for layer, kind in ((-1, "feedback"), (layers - 2, "block")):
        model = fair(base, layer, kind, 0.0)
        documents = micro_model.language.documents(rows, seed=5, length=8)
        given = torch.tensor([each.ids for each in documents])

        generate = partial(
            model.generate, given, **{**GIVEN, "max_new_tokens": 40}, eos_token_id=None,
            sedac_mode="exact",
        )  # fmt: skip
        in_core, by_steps = both_ways(generate, cycles, calls)
        assert in_core == by_steps
        assert any(len(path) > 1 for _, _, paths, *_ in in_core for path in paths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_halves_are_rounded_alike(
    architecture: str, dtype: torch.dtype, cycles: list[Any], calls: list[int]
) -> None:
    model, given = fair(build_tiny(architecture, dtype=dtype), 1, "feedback"), padded(3)

    generate = partial(model.generate, **given, **GIVEN, eos_token_id=None, sedac_mode="exact")
    in_core, by_steps = both_ways(generate, cycles, calls)
    assert in_core == by_steps


def test_a_draft_vocabulary_names_its_words(cycles: list[Any], calls: list[int]) -> None:
    words = torch.arange(90, 10, -2)
    model, given = fair(build_tiny("llama"), 1, "feedback", draft_vocabulary=words), padded(2)

    generate = partial(model.generate, **given, **GIVEN, eos_token_id=None, sedac_mode="exact")
    in_core, by_steps = both_ways(generate, cycles, calls)
    assert in_core == by_steps


def test_the_text_alone_drafts_without_a_head(cycles: list[Any], calls: list[int]) -> None:
    model, given = SedacForCausalLM.from_base(build_tiny("qwen2")), padded(4)

    generate = partial(model.generate, **given, **GIVEN, eos_token_id=None, sedac_mode="exact")
    in_core, by_steps = both_ways(generate, cycles, calls)
    assert in_core == by_steps
    assert max(counts[0] for *_, counts, _ in in_core) > 1


@pytest.mark.parametrize("rows", [1, 4])
def test_plain_steps_leave_the_same_figures(
    rows: int, calls: list[int], llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []
    commit = ExitSession.commit

    def noted(self: ExitSession, *args: Any) -> StepRecord:
        record = commit(self, *args)
        assert self.live is not None
        steps.append((record.layers.tolist(), self.live.tolist()))
        return record

    monkeypatch.setattr(ExitSession, "commit", noted)
    model, given = wrap(llama), padded(rows)
    ends = ending(model, given) or None

    def told() -> Any:
        model.exit_stats.reset()
        steps.clear()
        streamer = Columns()
        more = {"streamer": streamer} if rows == 1 else {}
        text = model.generate(**given, **GIVEN, eos_token_id=ends, sedac_mode="plain", **more)
        return text.tolist(), list(steps), model.exit_stats.to_dict(), streamer.columns

    in_core = told()
    assert len(calls) == len(in_core[1]) - 1, "one call for each token behind the prompt's"
    assert rows == 1 or calls[-1] < calls[0] == rows, "rows have ended at different times"
    calls.clear()
    with step_by_step():
        assert told() == in_core
    assert not calls


class Columns(BaseStreamer):
    """Keeps what it is given; may do something at one of the tokens."""

    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.columns: list[list[int]] = []
        self._at, self._act = at, act

    def put(self, value: Tensor) -> None:
        self.columns.append(value.flatten().tolist())
        if len(self.columns) == self._at:
            self._act()

    def end(self) -> None:
        self.columns.append([])


@pytest.mark.parametrize("mode", ["exact", "plain"])
def test_a_change_of_weights_is_noticed_within_a_text(
    mode: str, cycles: list[Any], calls: list[int]
) -> None:
    texts = []
    for changes, by_steps in ((True, False), (True, True), (False, False)):
        base = build_tiny("llama")
        model, given = fair(base, 1, "feedback"), padded(1)

        def change(base: Any = base, changes: bool = changes) -> None:
            with torch.no_grad():
                base.model.layers[1].mlp.down_proj.weight.mul_(-3.0 if changes else 1.0)
                base.model.embed_tokens.weight.mul_(-2.0 if changes else 1.0)

        streamer = Columns(5, change)
        calls.clear()
        with step_by_step() if by_steps else nullcontext():
            text = model.generate(
                **given, **GIVEN, eos_token_id=None, sedac_mode=mode, streamer=streamer
            )
        assert bool(calls) != by_steps
        texts.append(text.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_weights_are_looked_at_now_and_then_where_nobody_else_runs(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    say, texts = CoreCycles.say, []
    for changes in (True, False):
        model, given = fair(build_tiny("llama"), 1, "feedback"), padded(1)
        weight = model.base_lm.model.layers[1].mlp.down_proj.weight
        looked: list[bool] = []

        def acts(
            self: CoreCycles,
            outcome: Any,
            weight: Tensor = weight,
            changes: bool = changes,
            looked: list[bool] = looked,
        ) -> None:
            say(self, outcome)
            looked.append(True)
            if len(looked) == 3 and changes:
                weight.data = weight.data * -3.0  # the memory that the core reads is let go of

        monkeypatch.setattr(CoreCycles, "say", acts)
        text = model.generate(
            **given, max_new_tokens=48, eos_token_id=None, do_sample=False, sedac_mode="plain"
        )
        texts.append(text[0, given["input_ids"].shape[1] :].tolist())
    assert len(calls) == 2 * 47
    changed, unchanged = texts
    assert changed[:16] == unchanged[:16], "what was described is read until the next look"
    assert changed[17:] != unchanged[17:], "and then what lies there now"


class Hostile(LogitsProcessor):
    """Forbids the word that would be said."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


@pytest.mark.parametrize("mode", ["exact", "plain"])
@pytest.mark.parametrize(
    ("values", "serves"),
    [
        ({}, True),
        ({"min_new_tokens": 4, "eos_token_id": 5}, True),
        ({"do_sample": True}, False),
        ({"repetition_penalty": 1.3}, False),
        ({"logits_processor": LogitsProcessorList([Hostile()])}, False),
        ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(60.0)])}, False),
        ({"return_dict_in_generate": True}, False),
        ({"return_dict_in_generate": True, "output_scores": True}, False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_other_calls_are_decoded_step_by_step(
    values: dict[str, Any], serves: bool, mode: str, llama: PreTrainedModel, calls: list[int]
) -> None:
    model = wrap(llama, {1: "feedback"})
    given = {**GIVEN, "eos_token_id": None, **values}
    model.generate(**padded(1), **given, sedac_mode=mode)
    assert bool(calls) == serves


def test_a_head_that_runs_through_torch_is_asked_step_by_step(
    llama: PreTrainedModel, calls: list[int]
) -> None:
    model = wrap(llama, {1: "lens"})
    model.generate(**padded(1), **GIVEN, eos_token_id=None, sedac_mode="exact")
    assert not calls
    model.generate(**padded(1), **GIVEN, eos_token_id=None, sedac_mode="plain")
    assert calls


def test_rotary_tables_that_follow_the_length_go_step_by_step(
    llama: PreTrainedModel, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RotaryTables, "up_to", lambda self, most: None)
    model, given = wrap(llama), {**GIVEN, "eos_token_id": None}
    found = model.generate(**padded(2), **given, sedac_mode="plain")
    assert not calls
    assert torch.equal(found, llama.generate(**padded(2), **given))


@pytest.mark.parametrize("mode", ["exact", "plain"])
def test_logits_that_are_not_numbers_give_the_same_text(
    mode: str, cycles: list[Any], calls: list[int]
) -> None:
    base = build_tiny("llama")
    model, given = fair(base, 1, "feedback"), padded(2)
    # Behind a word that the second row comes to there are no numbers any more.
    sound = base.generate(**given, **GIVEN, eos_token_id=None)
    [word, *_] = set(sound[1, 12:].tolist()) - set(given["input_ids"].flatten().tolist())
    with torch.no_grad():
        base.get_input_embeddings().weight[word] = torch.nan

    generate = partial(model.generate, **given, **GIVEN, eos_token_id=None, sedac_mode=mode)
    assert not torch.equal(generate(), sound)
    cycles.clear()
    in_core, by_steps = both_ways(generate, cycles, calls)
    # What is not finite differs from itself: probabilities are left out.
    assert [(g, p, c) for g, _, p, c, _ in in_core] == [(g, p, c) for g, _, p, c, _ in by_steps]
