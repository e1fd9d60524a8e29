"""Exact mode within a call: processors, criteria, streamers, what is returned and told."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from sedac_hf.cli_trace import TraceStreamer, legend
from tests.generation.drafting import EXACT, GREEDY, NEW, knowing, padded
from tests.generation.drafting import _eager as _eager
from tests.generation.drafting import modules as modules
from tests.tiny_models import LAYERS, VOCABULARY


class _Biased(LogitsProcessor):
    """Depends on the whole prefix, and writes into what it is given."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.lengths.append(input_ids.shape[1])
        scores[:, int(input_ids.sum()) % VOCABULARY] += 5.0
        return scores


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"forced_eos_token_id": 2},
        {"bad_words_ids": [[5], [7, 9]]},
    ],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.parametrize("rows", [1, 3])
def test_processors_see_each_nodes_own_prefix(
    llama: PreTrainedModel, rows: int, values: dict[str, Any]
) -> None:
    given = padded(rows)
    expected = llama.generate(**given, **GREEDY, **values)
    assert torch.equal(knowing(llama).generate(**given, **GREEDY, **values, **EXACT), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_processor_of_ones_own_is_called_once_a_token_in_order(
    llama: PreTrainedModel, rows: int
) -> None:
    given = padded(rows)
    base, own = _Biased(), _Biased()
    expected = llama.generate(**given, **GREEDY, logits_processor=LogitsProcessorList([base]))
    found = knowing(llama).generate(
        **given, **GREEDY, logits_processor=LogitsProcessorList([own]), **EXACT
    )
    assert torch.equal(found, expected)
    assert own.lengths == base.lengths


class _AfterToken(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_stop_where_the_bases_rows_stop(llama: PreTrainedModel, rows: int) -> None:
    model = knowing(llama)
    given = padded(rows)
    plain = llama.generate(**given, **{**GREEDY, "eos_token_id": None})
    ends = plain[:, 9:][torch.arange(rows), torch.arange(rows) + 3].tolist()
    for values in ({"eos_token_id": ends}, {"eos_token_id": ends[0]}, {"max_new_tokens": 1}):
        expected = llama.generate(**given, **{**GREEDY, **values})
        assert torch.equal(model.generate(**given, **{**GREEDY, **values}, **EXACT), expected)
    stop = StoppingCriteriaList([_AfterToken(ends[0])])
    expected = llama.generate(**given, **GREEDY, stopping_criteria=stop)
    found = model.generate(**given, **GREEDY, stopping_criteria=stop, **EXACT)
    assert torch.equal(found, expected)


class _Noted(BaseStreamer):
    def __init__(self) -> None:
        self.put_: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_are_told_step_by_step(llama: PreTrainedModel, rows: int) -> None:
    given = padded(rows)
    plain = llama.generate(**given, **{**GREEDY, "eos_token_id": None})
    values = {**GREEDY, "eos_token_id": int(plain[0, 13])}
    base, own = _Noted(), _Noted()
    llama.generate(**given, **values, streamer=base)
    knowing(llama).generate(**given, **values, streamer=own, **EXACT)
    assert own.put_ == base.put_
    assert own.ended


def test_scores_and_logits_are_those_of_each_step(llama: PreTrainedModel) -> None:
    given = padded(2)
    values = {**GREEDY, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    wanted = {"output_scores": True, "output_logits": True, "eos_token_id": None}
    expected = llama.generate(**given, **{**values, **wanted})
    found = knowing(llama).generate(**given, **{**values, **wanted}, **EXACT)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(found[name]), torch.stack(expected[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_became_of_drafts_is_told(llama: PreTrainedModel) -> None:
    model = knowing(llama)
    given = padded(2)
    values = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    output = model.generate(**given, **values, **EXACT)
    told = output.drafts
    assert told["tokens"] == 2 * (NEW - 1)  # the first comes with the prompt
    assert told["tokens_per_pass"] > 1.5
    assert sum(told["passes_by_nodes"].values()) == told["passes"]
    assert sum(told["passes_by_levels"].values()) == told["passes"]
    assert told["acceptance_by_depth"][0] > 0.5
    assert sum(told["accepted_by_source"].values()) <= told["tokens"]
    assert told["reason_without_drafts"] == ""
    assert (output.exit_layers == LAYERS).all()
    assert output.exit_layers.shape == (2, NEW)
    stats = model.exit_stats
    assert stats.tokens == 2 * NEW
    assert stats.to_dict()["drafts"] == told
    assert "tokens per verification" in str(stats)
    model.generate(**given, **values, **EXACT)
    assert stats.drafts.passes == 2 * told["passes"]
    stats.reset()
    assert "drafts" not in stats.to_dict()


def test_why_there_were_no_drafts_is_told(llama: PreTrainedModel) -> None:
    model = knowing(llama)
    given = padded(2)
    given["attention_mask"][0, 4] = 0
    output = model.generate(**given, **GREEDY, return_dict_in_generate=True, **EXACT)
    assert "more than padding on the left" in output.drafts["reason_without_drafts"]
    assert "more than padding" in model.exit_stats.drafts.reason


def test_threads_draft_side_by_side(llama: PreTrainedModel) -> None:
    model = knowing(llama)
    given = [padded(rows) for rows in (1, 2, 3, 4)]
    expected = [llama.generate(**each, **GREEDY) for each in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: model.generate(**each, **GREEDY, **EXACT), given * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))


def test_accepted_drafts_have_colours_of_their_own(llama: PreTrainedModel) -> None:
    model = knowing(llama)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system="truecolor", width=200)
    words: Any = SimpleNamespace(decode=lambda ids, **_: "".join(f"{token} " for token in ids))
    streamer = TraceStreamer(model, words, console)
    output = model.generate(
        **padded(1), **GREEDY, return_dict_in_generate=True, streamer=streamer, **EXACT
    )
    drafts = [token.draft for token in streamer.tokens]
    assert drafts.count("head") == output.drafts["accepted_by_source"]["head"] > 0
    assert drafts[0] is None
    assert "\x1b[1;36m" in written.getvalue()
    line = legend(streamer.layers, [LAYERS - 2], LAYERS, drafts).plain
    assert f"drafted by an exit: {drafts.count('head')}" in line
    assert f"the base alone: {drafts.count(None)}" in line
