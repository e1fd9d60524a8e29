"""Collectors on models that generate: every token is counted once, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from sedac_hf.errors import ConfigError
from sedac_hf.metrics import SEDACMetricsCollector, serve_metrics
from sedac_hf.metrics.call_meter import MODES
from sedac_hf.modeling import SedacForCausalLM
from tests.generation.test_settled import settled
from tests.metrics.scraping import scraped
from tests.tiny_models import VOCABULARY, build_tiny
from tests.wrapping import mixed, wrap

NEW = 14
GIVEN: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}


def prompts(rows: int = 3, length: int = 8) -> Tensor:
    """Prompts that repeat themselves, so that their text drafts too."""
    drawn = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
    return torch.cat([drawn, drawn], dim=1)


def propagating() -> SedacForCausalLM:
    """Some tokens leave at two checkpoints, others go all the way; transformers' own loop runs."""
    model, _ = mixed(build_tiny("llama"), {0: "lens", 1: "block"}, prompts())
    return model


CASES: dict[str, tuple[str, Callable[[], SedacForCausalLM], str]] = {
    "propagate": ("certified", propagating, "native"),
    "settle": ("certified", settled, "native"),
    "settle-modules": ("certified", settled, "modules"),
    "exact": ("exact", settled, "native"),
    "exact-modules": ("exact", settled, "modules"),
    "exact-without-heads": ("exact", lambda: wrap(build_tiny("llama"), {1: "lens"}), "native"),
    "plain": ("plain", settled, "native"),
    "plain-modules": ("plain", settled, "modules"),
    "off": ("off", settled, "native"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A mode, a model, and a token at which some of its texts end before others."""
    mode, build, runs_on = CASES[request.param]
    if runs_on == "modules":
        monkeypatch.setenv("SEDAC_PASS", "modules")
    model = build()
    text = model.generate(prompts(), **GIVEN, eos_token_id=None, sedac_mode=mode)
    model.exit_stats.reset()
    return mode, model, int(text[0, prompts().shape[1] + NEW // 2])


def texts_of(sequences: Tensor, end: int | None) -> list[int]:
    """New tokens of all rows without padding, in order of their values."""
    tokens = []
    for row in sequences[:, prompts().shape[1] :].tolist():
        tokens += row[: row.index(end) + 1] if end in row else row
    return sorted(tokens)


def check(found: Any, model: SedacForCausalLM, mode: str, tokens: int) -> None:
    """That all figures add up to these tokens, and are those of `exit_stats`."""
    assert found["dropped"] == found["waiting"] == 0
    assert found["taken"] == found["sent"]
    assert found["tokens"] == [tokens if name == mode else 0 for name in MODES]
    exits = {layer["layer"]: layer["exits"] for layer in found["layers"]}
    assert sum(exits.values()) + found["full"] == tokens
    assert sum(found["sources"]) == tokens
    times = [found["first_seconds"], found["full_seconds"]]
    times += [layer["seconds"] for layer in found["layers"]]
    assert sum(sum(one["counts"]) for one in times) == tokens
    for layer in found["layers"]:
        assert layer["exits"] <= layer["tries"] <= layer["decisions"] <= tokens
        assert sum(layer["risk"]["counts"]) == layer["decisions"]
    if mode != "off":
        assert model.exit_stats.tokens == tokens
        assert model.exit_stats.exits_by_layer == exits
        tries = {layer["layer"]: layer["tries"] for layer in found["layers"]}
        assert model.exit_stats.tries_by_layer == tries


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_token_is_counted_once(case: Any, ends: bool, dictionary: bool) -> None:
    mode, model, end = case
    end = end if ends else None
    given = {**GIVEN, "eos_token_id": end, "sedac_mode": mode}
    expected = model.generate(prompts(), **given)
    model.exit_stats.reset()
    collector = SEDACMetricsCollector.for_model(model)
    with collector.attach(model):
        output = model.generate(prompts(), **given, return_dict_in_generate=dictionary)
    sequences = output.sequences if dictionary else output
    assert torch.equal(sequences, expected)
    texts = texts_of(sequences, end)
    if ends:
        assert len(texts) < 3 * NEW
    found = collector.snapshot()
    check(found, model, mode, len(texts))
    assert sum(sum(call["counts"]) for call in found["calls"]) == 1
    # The log tells each token once for every checkpoint it came to, or once if it came to none.
    told: dict[int, int] = {}
    for one in collector.token_decisions():
        if one.risk_score is None or one.layer_idx == collector.layer_indices[0]:
            told[one.token_id] = told.get(one.token_id, 0) + 1
    assert sorted(np.repeat(list(told), list(told.values())).tolist()) == texts
    if mode == "certified":
        assert 0 < found["full"] < len(texts)


def test_nothing_is_counted_after_it_was_detached(case: Any) -> None:
    mode, model, _ = case
    collector = SEDACMetricsCollector.for_model(model)
    attachment = model.attach_metrics(collector)
    attachment.detach()
    model.generate(prompts(), **GIVEN, sedac_mode=mode)
    assert collector.snapshot()["sent"] == 0
    assert model.metrics is None


class Scraper(BaseStreamer):
    """Asks the server whenever a token is shown."""

    def __init__(self, url: str, mode: str) -> None:
        self._url, self._mode = url, mode
        self.seen: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(scraped(self._url)["sedac_tokens_total", self._mode])

    def end(self) -> None:
        self.put(torch.empty(0))


@pytest.mark.parametrize("name", [name for name in CASES if name != "off"])
def test_a_scrape_during_generation_sees_it_grow(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, build, runs_on = CASES[name]
    if runs_on == "modules":
        monkeypatch.setenv("SEDAC_PASS", "modules")
    model = build()
    collector = SEDACMetricsCollector.for_model(model)
    model.exit_stats.reset()
    with collector.attach(model), serve_metrics(collector, 0) as server:
        streamer = Scraper(server.url, mode)
        given = {**GIVEN, "eos_token_id": None, "sedac_mode": mode, "streamer": streamer}
        model.generate(prompts(1), **given)
        after = scraped(server.url)
    assert streamer.seen == sorted(streamer.seen)
    assert 0 < streamer.seen[len(streamer.seen) // 2] < NEW
    assert after["sedac_tokens_total", mode] == NEW == model.exit_stats.tokens
    layers = sum(
        value for (one, *_), value in after.items() if one == "sedac_tokens_by_layer_total"
    )
    assert layers == NEW


def test_threads_that_generate_at_once_add_up() -> None:
    model = settled()
    modes = ["certified", "exact", "plain", "off"]
    collector = SEDACMetricsCollector.for_model(model)
    given = {**GIVEN, "eos_token_id": None}
    for mode in modes:
        model.generate(prompts(2), **given, sedac_mode=mode)
    model.exit_stats.reset()
    with collector.attach(model), ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(model.generate, prompts(2), **given, sedac_mode=mode) for mode in modes * 3
        ]
        for job in jobs:
            job.result()
    found = collector.snapshot()
    assert found["tokens"] == [3 * 2 * NEW] * 4
    assert sum(layer["exits"] for layer in found["layers"]) == sum(
        model.exit_stats.exits_by_layer.values()
    )
    assert [sum(call["counts"]) for call in found["calls"]] == [3] * 4
    assert found["taken"] == found["sent"]


@pytest.mark.parametrize("returned", [1, 3])
def test_beams_count_as_exit_stats_counts_them(returned: int) -> None:
    model = propagating()
    model.exit_stats.reset()
    collector = SEDACMetricsCollector.for_model(model)
    given = {**GIVEN, "eos_token_id": None, "num_beams": 3, "num_return_sequences": returned}
    with collector.attach(model):
        model.generate(prompts(2), **given, sedac_mode="certified")
    found = collector.snapshot()
    assert found["tokens"][MODES.index("certified")] == model.exit_stats.tokens > 0
    exits = {layer["layer"]: layer["exits"] for layer in found["layers"]}
    assert exits == model.exit_stats.exits_by_layer


def test_an_assistant_counts_what_stays() -> None:
    base = build_tiny("llama")
    model = settled()
    model.exit_stats.reset()
    collector = SEDACMetricsCollector.for_model(model)
    given = {**GIVEN, "eos_token_id": None, "sedac_mode": "plain", "assistant_model": base}
    with collector.attach(model):
        new = model.generate(prompts(1), **given).shape[1] - prompts().shape[1]
    assert collector.snapshot()["tokens"][MODES.index("plain")] == model.exit_stats.tokens == new


@pytest.mark.parametrize("way", ["config", "embeddings", "default", "nothing"])
def test_off_counts_however_it_is_asked(way: str) -> None:
    model = settled()
    ids = prompts(2)
    text = model.generate(ids, **GIVEN, eos_token_id=None, sedac_mode="off")
    end = int(text[0, ids.shape[1] + 5])
    given: dict[str, Any] = {"sedac_mode": "off"}
    if way == "config":
        given |= {"inputs": ids, "generation_config": GenerationConfig(**GIVEN, eos_token_id=end)}
    elif way == "embeddings":
        embeddings = model.get_input_embeddings()(ids)
        given |= {**GIVEN, "inputs_embeds": embeddings, "eos_token_id": [end, 1]}
    elif way == "default":
        given |= {**GIVEN, "input_ids": ids}
        model.generation_config.eos_token_id = end
    else:
        given |= {**GIVEN, "eos_token_id": None, "bos_token_id": 1}
    collector = SEDACMetricsCollector.for_model(model)
    with collector.attach(model):
        sequences = model.generate(**given)
    start = {"embeddings": 0, "nothing": 1}.get(way, ids.shape[1])
    ends = {end, 1} if way == "embeddings" else {end}
    expected = 0
    for row in sequences[:, start:].tolist():
        stop = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
        expected += len(row) if way == "nothing" else stop + 1
    assert collector.snapshot()["tokens"][0] == expected > 0


def test_a_step_outside_of_generate_counts_too() -> None:
    model = settled()
    collector = SEDACMetricsCollector.for_model(model)
    model.exit_stats.reset()
    with collector.attach(model), torch.no_grad():
        output = model(input_ids=prompts(2), use_cache=True)
        for _ in range(4):
            step = output.logits[:, -1:].argmax(-1)
            cache = output.past_key_values
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
    found = collector.snapshot()
    assert found["tokens"][MODES.index("certified")] == model.exit_stats.tokens == 8
    assert sum(found["first_seconds"]["counts"]) == 0


def test_drafts_that_were_accepted_are_told_by_source() -> None:
    model = settled()
    model.generate(prompts(1), **GIVEN, eos_token_id=None, sedac_mode="exact")
    model.exit_stats.reset()
    collector = SEDACMetricsCollector.for_model(model)
    with collector.attach(model):
        model.generate(prompts(2), **GIVEN, eos_token_id=None, sedac_mode="exact")
    found, drafts = collector.snapshot(), model.exit_stats.drafts.to_dict()
    assert found["passes"] == drafts["passes"] > 0
    by_source = dict(zip(("base", "head", "lookup"), found["sources"], strict=True))
    for source in ("head", "lookup"):
        assert by_source[source] == drafts["accepted_by_source"].get(source, 0)
    assert sum(found["sources"]) == 2 * NEW
    assert found["drafts"] >= by_source["head"] + by_source["lookup"]


def test_calls_in_which_exits_did_nothing_are_told() -> None:
    model = settled()
    collector = SEDACMetricsCollector.for_model(model)
    with collector.attach(model):
        with model.exits_disabled():
            model.generate(prompts(1), **GIVEN, sedac_mode="certified")
        model.exits_off_reason = "another data type."
        model.generate(prompts(1), **GIVEN, sedac_mode="certified")
        model.generate(
            prompts(1), **GIVEN, sedac_mode="exact", output_hidden_states=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert collector.snapshot()["occurrences"] == {
        "ran_as_base": 1, "without_exits": 1, "without_drafts": 1
    }  # fmt: skip


def test_a_collector_that_does_not_watch_a_checkpoint_is_refused() -> None:
    model = settled()
    with pytest.raises(ConfigError, match="for_model"):
        SEDACMetricsCollector([1]).attach(model)
    assert model.metrics is None


def test_the_last_collector_counts_and_the_one_before_comes_back() -> None:
    model = settled()
    first, second = (SEDACMetricsCollector.for_model(model) for _ in range(2))
    with first.attach(model):
        with second.attach(model) as inner:
            assert inner is second
            assert model.metrics is second
        assert model.metrics is first
    assert model.metrics is None


def test_a_copy_of_a_model_has_no_collector() -> None:
    model = settled()
    with SEDACMetricsCollector.for_model(model).attach(model):
        assert copy.deepcopy(model).metrics is None
        assert model.metrics is not None
