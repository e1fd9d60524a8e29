"""Exact mode against the base's own generate: the same tokens, in every way of asking for them."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from sedac_hf.cli_trace import TraceStreamer, legend
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.generation.costs import PassCosts
from sedac_hf.generation.governor import Cycle, Governor
from sedac_hf.generation.governors import Governors
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, VOCABULARY, build_tiny, prompt
from tests.wrapping import wrap

NEW = 14
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
EXACT: dict[str, Any] = {"sedac_mode": "exact"}


class Eager(Governor):
    """Always drafts as much as it can, whatever this machine's clock says."""

    def __init__(self, has_head: bool) -> None:
        flat = PassCosts({1: 1.0})
        super().__init__(flat, flat if has_head else None, 0.0, most_nodes=8, most_levels=2)

    def begin(self) -> Cycle:
        return Cycle(on=True)

    def end(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the base's own modules; tests of the native pass have files of their own."""
    monkeypatch.setenv("SEDAC_PASS", "modules")


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(self: Any, run: Any, depth: Any, state: Any, head: Any, *args: Any) -> Governor:
        return Eager(head is not None)

    monkeypatch.setattr(Governors, "find", find)


def padded(rows: int, length: int = 9) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left; some repeat themselves."""
    ids = prompt(rows, length)
    ids[:, length - 4 :] = ids[:, length - 8 : length - 4]
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def knowing(base: PreTrainedModel, noise: float = 0.0) -> SedacForCausalLM:
    """A model whose exit knows the base's last layer, and so drafts what the base will say."""
    model = SedacForCausalLM.from_base(base, [CheckpointSpec(LAYERS - 2)], self_check=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return model


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each verification from now on."""
    seen: list[int] = []
    run = ModulePass.logits

    def counted(self: ModulePass, hidden: Tensor) -> Tensor:
        seen.append(int(hidden.shape[1]))
        return run(self, hidden)

    monkeypatch.setattr(ModulePass, "logits", counted)
    return seen


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("kinds", [{-1: "feedback"}, {1: "block"}], ids=str)
def test_greedy_tokens_are_the_bases(
    tiny: PreTrainedModel, kinds: dict[int, str], rows: int
) -> None:
    model = wrap(tiny, kinds)
    given = padded(rows)
    expected = tiny.generate(**given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY, **EXACT), expected)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("rows", [1, 4])
def test_accepted_drafts_are_the_bases_tokens(
    tiny: PreTrainedModel, rows: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = knowing(tiny, noise)
    given = padded(rows)
    expected = tiny.generate(**given, **GREEDY)
    model.generate(**given, max_new_tokens=2, **EXACT)  # finds out what serves the model
    seen = passes(monkeypatch)
    assert torch.equal(model.generate(**given, **GREEDY, **EXACT), expected)
    if noise == 0:
        # What a random model says is flat, so not every right draft is among the eight nodes.
        assert len(seen) <= (NEW - 1) * 2 // 3


def test_the_text_alone_drafts_where_there_are_no_heads(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SedacForCausalLM.from_base(llama)
    given = padded(3)
    long = {**GREEDY, "max_new_tokens": 60}
    expected = llama.generate(**given, **long)
    seen = passes(monkeypatch)
    assert torch.equal(model.generate(**given, **long, **EXACT), expected)
    assert len(seen) < 60 + 2  # two of them are those of the check
    assert max(seen) > 4


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_seed_gives_the_text_that_it_gives_the_base(
    llama: PreTrainedModel, rows: int, noise: float
) -> None:
    model = knowing(llama, noise)
    given = padded(rows)
    values = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    for seed in range(4):
        torch.manual_seed(seed)
        expected = llama.generate(**given, **values, num_return_sequences=2)
        torch.manual_seed(seed)
        found = model.generate(**given, **values, num_return_sequences=2, **EXACT)
        assert torch.equal(found, expected)


def test_samples_have_the_bases_distribution() -> None:
    """Chi-squared over pairs of tokens; the exit drafts something else than what is right."""
    base = build_tiny("llama", vocab_size=7, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        base.lm_head.weight.mul_(0.2)
    model = knowing(base, 0.05)
    ids = prompt(1, 5) % 7
    draws, new = 4000, 2
    with torch.no_grad():
        first = base(ids).logits[0, -1].softmax(-1)
        pairs = torch.cat([ids.expand(7, -1), torch.arange(7)[:, None]], dim=1)
        chances = (first[:, None] * base(pairs).logits[:, -1].softmax(-1)).flatten().double()
    torch.manual_seed(0)
    text = model.generate(
        ids.expand(draws // 20, -1),
        num_return_sequences=20,
        do_sample=True,
        top_k=0,
        max_new_tokens=new + 2,  # so that the tokens that count are drafted
        **EXACT,
    )
    found = torch.bincount(text[:, 5] * 7 + text[:, 6], minlength=49).double()
    expected = chances * draws
    large = expected > 5
    statistic = float(((found - expected) ** 2 / expected)[large].sum())
    freedom = int(large.sum()) - 1
    # Beyond this a right sampler comes once in ten thousand times or less.
    assert statistic < freedom + 3.72 * (2 * freedom) ** 0.5 + 10
    assert int(found[~large].sum()) < expected[~large].sum() + 5 * draws**0.5


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


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("kinds", [{-1: "feedback", 0: "block"}, {2: "block"}], ids=str)
def test_the_cache_that_comes_back_goes_on(
    tiny: PreTrainedModel, kind: str, kinds: dict[int, str]
) -> None:
    model = wrap(tiny, kinds)
    given = padded(2)
    cache: Any = DynamicCache(config=tiny.config)
    if kind == "static":
        cache = StaticCache(config=tiny.config, max_cache_len=32)
    values = {**GREEDY, "eos_token_id": None, "max_new_tokens": 7}
    first = model.generate(
        **given, **values, past_key_values=cache, return_dict_in_generate=True, **EXACT
    )
    assert first.past_key_values is cache
    lengths = {int(cache.get_seq_length(i)) for i in range(len(cache.layers))}
    assert lengths == {9 + 6}
    mask = torch.cat([given["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
    again = {"attention_mask": mask, "past_key_values": cache}
    found = model.generate(first.sequences, **again, **values, **EXACT)
    expected = tiny.generate(**given, **{**values, "max_new_tokens": 14})
    assert torch.equal(found, expected)


def test_what_the_heads_drafted_from_is_as_if_they_had_read_it(llama: PreTrainedModel) -> None:
    """The cache after exact mode against the same text given as a prompt, heads included."""
    model = wrap(llama, {-1: "feedback", 1: "deep"})
    given = padded(2)
    values = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True}
    output = model.generate(**given, **values, **EXACT)
    cache = output.past_key_values
    text = output.sequences[:, :-1]
    fresh = DynamicCache(config=llama.config)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, NEW - 1), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(
            text,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=fresh,
            use_cache=True,
        )
    assert len(cache.layers) == len(fresh.layers)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        for row in range(2):
            first = row % 4
            torch.testing.assert_close(
                ours.keys[row, :, first:], theirs.keys[row, :, first:], rtol=1e-3, atol=1e-3
            )


def test_embeddings_and_chunks_are_prompts_too(llama: PreTrainedModel) -> None:
    model = knowing(llama)
    given = padded(2)
    expected = llama.generate(**given, **GREEDY)
    found = model.generate(**given, **GREEDY, prefill_chunk_size=4, **EXACT)
    assert torch.equal(found, expected)
    embedded = {
        "inputs_embeds": llama.get_input_embeddings()(given["input_ids"]).detach(),
        "attention_mask": given["attention_mask"],
    }
    expected = llama.generate(**embedded, **GREEDY)
    assert torch.equal(model.generate(**embedded, **GREEDY, **EXACT), expected)


def test_a_small_draft_vocabulary_takes_in_the_prompts_tokens(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = padded(1)
    expected = llama.generate(**given, **GREEDY)
    chosen = torch.tensor([3, 4, 5])
    specs = [CheckpointSpec(LAYERS - 2)]
    model = SedacForCausalLM.from_base(llama, specs, draft_vocabulary=chosen)
    widths = []
    run = ModulePass.draft_logits

    def seen(self: ModulePass, hidden: Tensor) -> Tensor:
        logits = run(self, hidden)
        widths.append(int(logits.shape[-1]))
        return logits

    monkeypatch.setattr(ModulePass, "draft_logits", seen)
    assert torch.equal(model.generate(**given, **GREEDY, **EXACT), expected)
    assert set(widths) == {len({3, 4, 5, *given["input_ids"].flatten().tolist()})}


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "offloaded_static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_what_exact_mode_cannot_serve_runs_at_full_depth(
    llama: PreTrainedModel, values: dict[str, Any]
) -> None:
    if "offloaded_static" in values.values() and not torch.cuda.is_available():
        values = {"cache_implementation": "static"}
    given = padded(1)
    expected = llama.generate(**given, **GREEDY, **values)
    found = knowing(llama).generate(**given, **GREEDY, **values, **EXACT)
    if not isinstance(found, Tensor):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def test_padding_in_the_middle_runs_at_full_depth(llama: PreTrainedModel) -> None:
    given = padded(2)
    given["attention_mask"][0, 4] = 0
    expected = llama.generate(**given, **GREEDY)
    assert torch.equal(knowing(llama).generate(**given, **GREEDY, **EXACT), expected)


@pytest.mark.parametrize("where", ["head", "base"])
def test_what_is_not_a_number_is_never_accepted_as_a_draft(
    llama: PreTrainedModel, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = knowing(llama)
    given = padded(1)
    expected = llama.generate(**given, **GREEDY)
    model.generate(**given, max_new_tokens=2, **EXACT)
    name = "draft_logits" if where == "head" else "logits"
    run = getattr(ModulePass, name)
    kept = []
    keep = ModulePass.keep

    def broken(self: ModulePass, hidden: Tensor) -> Tensor:
        logits = run(self, hidden).clone()
        logits[..., 7] = float("nan")
        return logits

    def noted(self: ModulePass, part: int, length: Any, path: Any, counts: Any) -> None:
        kept.append(int(np.max(counts)))
        keep(self, part, length, path, counts)

    monkeypatch.setattr(ModulePass, name, broken)
    monkeypatch.setattr(ModulePass, "keep", noted)
    found = model.generate(**given, **GREEDY, **EXACT)
    if where == "head":
        assert torch.equal(found, expected)
    else:
        assert set(found[0, 10:].tolist()) == {7}  # as argmax has it, in the base too
    assert max(kept) == 1 if where == "base" else kept


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
