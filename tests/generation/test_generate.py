"""Every way of generating, with exits off, plain, forced and mixed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from sedac_hf.modeling import SedacForCausalLM
from tests.threads import in_threads
from tests.tiny_models import LAYERS, VOCABULARY, build_tiny, prompt
from tests.wrapping import exits_by_hand, mixed, rule, wrap

NEW = 8
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
KINDS = {0: "block", 2: "feedback"}


@pytest.fixture
def model(llama: PreTrainedModel) -> SedacForCausalLM:
    """Exits that some tokens take and others do not."""
    return mixed(llama, KINDS, prompt(2, 6))[0]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_off_and_plain_generate_what_the_base_generates(model: SedacForCausalLM, way: str) -> None:
    rows = 1 if way == "prompt lookup" else 2
    values = {**GREEDY, **WAYS[way]}
    torch.manual_seed(5)
    expected = model.base.generate(prompt(rows, 6), **values)
    for mode in ("off", "plain", "exact"):
        torch.manual_seed(5)
        found = model.generate(prompt(rows, 6), **values, sedac_mode=mode)
        assert torch.equal(found, expected), mode


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"sample": True},
        {"sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
    ],
)
def test_exits_follow_the_rule_in_every_way(llama: PreTrainedModel, values: dict[str, Any]) -> None:
    model, output = mixed(llama, KINDS, prompt(2, 6), **values)
    expected = exits_by_hand(model, output.sequences[:, :-1], 6)
    assert torch.equal(output.exit_layers, expected.layers[:, 5:])
    logits = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits, expected.logits[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["static cache", "prefill in chunks"])
def test_the_kind_of_cache_changes_nothing(model: SedacForCausalLM, way: str) -> None:
    expected = model.generate(prompt(2, 6), **GREEDY, return_dict_in_generate=True)
    found = model.generate(prompt(2, 6), **GREEDY, **WAYS[way], return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.exit_layers, expected.exit_layers)
    assert (found.exit_layers < LAYERS).any()


def test_static_cache_with_left_padding_and_feedback() -> None:
    ids = prompt(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = mixed(build_tiny("mistral"), KINDS, ids, attention_mask=mask)[0]
    values = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True}
    expected = model.generate(ids, **values)
    found = model.generate(ids, **values, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.exit_layers, expected.exit_layers)
    alone = model.generate(ids[:1, 3:], **GREEDY, return_dict_in_generate=True)
    assert torch.equal(alone.sequences[0, 4:], expected.sequences[0, 7:])
    assert torch.equal(alone.exit_layers[0], expected.exit_layers[0])


def test_beams_carry_their_exits_with_them(model: SedacForCausalLM) -> None:
    """Each beam's tokens, K/V and feedback move together: rescoring a beam alone agrees."""
    output = model.generate(
        prompt(2, 6),
        **GREEDY,
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    assert output.exit_layers.shape == (4, NEW)
    assert (output.exit_layers[:, 1:] < LAYERS).any()
    by_hand = exits_by_hand(model, output.sequences[:, :-1], 6)
    assert torch.equal(output.exit_layers, by_hand.layers[:, 5:])
    scores = by_hand.logits[:, 5:].log_softmax(-1)
    total = scores.gather(-1, output.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores, total, rtol=1e-4, atol=1e-4)


def test_forced_exits_leave_in_every_decode_step(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    for way in ("greedy", "sampling", "beams", "static cache"):
        model.exit_stats.reset()
        model.generate(prompt(2, 6), **{**GREEDY, **WAYS[way]})
        assert model.exit_stats.exit_share == pytest.approx((NEW - 1) / NEW), way


def test_no_cache_and_assistance_run_at_full_depth(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    for way in ("no cache", "prompt lookup"):
        values = {**GREEDY, **WAYS[way], "return_dict_in_generate": True}
        output = model.generate(prompt(1, 6), **values)
        assert torch.equal(output.sequences, llama.generate(prompt(1, 6), **values).sequences)
        assert (output.exit_layers == LAYERS).all()


def test_an_assistant_may_be_a_wrapper_or_a_model(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    expected = llama.generate(prompt(1, 6), **GREEDY)
    for assistant in (build_tiny("llama", seed=1), model):
        found = model.generate(prompt(1, 6), **GREEDY, assistant_model=assistant)
        assert torch.equal(found, expected)
    drafted = llama.generate(prompt(1, 6), **GREEDY, assistant_model=model)
    assert torch.equal(drafted, expected)


class _Words:
    """Takes the place of a tokenizer: one word per id."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"w{int(i)}" for i in torch.as_tensor(ids).flatten())


def test_streamers_get_every_token(
    model: SedacForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = _Words().decode(model.generate(prompt(1, 6), **GREEDY)[0, 6:])
    for mode in ("certified", "plain"):
        streamer = TextStreamer(_Words(), skip_prompt=True)
        tokens = model.generate(prompt(1, 6), **GREEDY, streamer=streamer, sedac_mode=mode)
        assert capsys.readouterr().out.strip() == _Words().decode(tokens[0, 6:])
    iterator = TextIteratorStreamer(_Words(), skip_prompt=True)
    values = {**GREEDY, "inputs": prompt(1, 6), "streamer": iterator}
    thread = threading.Thread(target=model.generate, kwargs=values)
    thread.start()
    assert "".join(iterator).strip() == expected
    thread.join()


def test_threads_generate_as_if_alone(model: SedacForCausalLM) -> None:
    prompts = [prompt(1 + i % 2, 4 + i, seed=i) for i in range(6)]
    alone = [model.generate(ids, **GREEDY, return_dict_in_generate=True) for ids in prompts]
    model.exit_stats.reset()
    found: list[Any] = [None] * len(prompts)

    def work(i: int) -> None:
        found[i] = model.generate(prompts[i], **GREEDY, return_dict_in_generate=True)

    in_threads(work, len(prompts))
    for ours, theirs in zip(found, alone, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.exit_layers, theirs.exit_layers)
    assert model.exit_stats.tokens == sum(len(ids) for ids in prompts) * NEW


def test_generation_goes_on_from_its_own_cache(model: SedacForCausalLM) -> None:
    whole = model.generate(prompt(2, 6), **GREEDY, return_dict_in_generate=True)
    first = model.generate(
        prompt(2, 6), **{**GREEDY, "max_new_tokens": 4}, return_dict_in_generate=True
    )
    second = model.generate(
        first.sequences,
        **{**GREEDY, "max_new_tokens": 4},
        past_key_values=first.past_key_values,
        return_dict_in_generate=True,
    )
    assert torch.equal(second.sequences, whole.sequences)
    layers = torch.cat([first.exit_layers, second.exit_layers], dim=1)
    assert torch.equal(layers, whole.exit_layers)
    assert (layers < LAYERS).any()


def test_a_cache_of_the_base_keeps_exits_off(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrap(llama, {1: "block"})
    ids = prompt(1, 6)
    cache = DynamicCache(config=llama.config)
    llama(ids[:, :4], past_key_values=cache)
    output = model.generate(ids, **GREEDY, past_key_values=cache, return_dict_in_generate=True)
    assert (output.exit_layers == LAYERS).all()
    assert torch.equal(output.sequences, llama.generate(ids, **GREEDY))
    assert sum("exits stay off" in record.message for record in caplog.records) == 1
    # A head without K/V of its own needs nothing of the past.
    lens = wrap(llama, {1: "lens"})
    cache = DynamicCache(config=llama.config)
    llama(ids[:, :4], past_key_values=cache)
    output = lens.generate(ids, **GREEDY, past_key_values=cache, return_dict_in_generate=True)
    assert (output.exit_layers[:, 1:] == 1).all()


def test_a_decode_loop_by_hand_exits_too(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    ids = prompt(1, 6)
    expected = model.generate(ids, **GREEDY)
    model.exit_stats.reset()
    with torch.no_grad():
        output = model(ids)
        for _ in range(NEW):
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
            output = model(ids[:, -1:], past_key_values=output.past_key_values)
    assert torch.equal(ids, expected)
    assert model.exit_stats.exits_by_layer == {1: NEW}


def test_embeddings_may_be_given(model: SedacForCausalLM) -> None:
    embeds = model.get_input_embeddings()(prompt(2, 6))
    expected = model.generate(prompt(2, 6), **GREEDY, return_dict_in_generate=True)
    found = model.generate(inputs_embeds=embeds, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences[:, 6:])
    assert torch.equal(found.exit_layers, expected.exit_layers)
    simulated = model(inputs_embeds=embeds, exits="simulate")
    again = model(prompt(2, 6), exits="simulate")
    assert torch.equal(simulated.exit_layers, again.exit_layers)


def test_other_processors_and_criteria_still_act(model: SedacForCausalLM) -> None:
    class Only(LogitsProcessor):
        """Leaves only even ids."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(torch.arange(VOCABULARY) % 2 == 1, -torch.inf)

    class After(StoppingCriteria):
        """Ends after three tokens."""

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    output = model.generate(
        prompt(2, 6),
        **GREEDY,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=StoppingCriteriaList([After()]),
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (2, 9)
    assert output.exit_layers.shape == (2, 3)
    assert (output.sequences[:, 6:] % 2 == 0).all()


def test_misspelt_arguments_are_still_caught(model: SedacForCausalLM) -> None:
    with pytest.raises(ValueError, match="sedac_mod"):
        model.generate(prompt(1, 3), sedac_mod="off", sedac_mode="plain")


def test_statistics_count_up_to_the_end_token(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    ids = prompt(3, 6)
    free = model.generate(ids, **GREEDY)
    end = int(free[0, 8])
    model.exit_stats.reset()
    output = model.generate(
        ids, **{**GREEDY, "eos_token_id": end}, pad_token_id=0, return_dict_in_generate=True
    )
    new = output.sequences[:, 6:]
    counted = 0
    for row in new.tolist():
        counted += row.index(end) + 1 if end in row else len(row)
    assert counted < new.numel(), "no row ended early: the test shows nothing"
    assert model.exit_stats.tokens == counted
    assert model.exit_stats.exits_by_layer[1] == counted - 3
    assert model.exit_stats.tries_by_layer[1] == counted - 3


def test_statistics_add_up(model: SedacForCausalLM) -> None:
    model.exit_stats.reset()
    output = model.generate(prompt(2, 6), **GREEDY, return_dict_in_generate=True)
    layers = output.exit_layers
    stats = model.exit_stats
    assert stats.tokens == layers.numel()
    assert stats.exits_by_layer == {k: int((layers == k).sum()) for k in KINDS}
    assert stats.mean_depth == pytest.approx(float((layers + 1).clamp(max=LAYERS).float().mean()))
    assert stats.depth == LAYERS
    before = stats.tokens
    model.generate(prompt(2, 6), **GREEDY)
    assert stats.tokens == 2 * before
    assert f"{2 * before} tokens" in str(stats)
    stats.reset()
    assert stats.to_dict() == {
        "tokens": 0,
        "depth": LAYERS,
        "mean_depth": float(LAYERS),
        "exit_share": 0.0,
        "exits_by_layer": {0: 0, 2: 0},
        "tries_by_layer": {0: 0, 2: 0},
        "soft_exit_share": 0.0,
        "soft_exits_by_layer": {0: 0, 2: 0},
        "mean_kept_share": 1.0,
        "tails": 0,
        "runs_on": "",
        "runs_on_reason": "",
    }


def test_replaced_rules_hold_inside_the_block_only(model: SedacForCausalLM) -> None:
    from sedac_hf.core.cascade_controller import CascadeConfig

    def share(**values: Any) -> float:
        output = model.generate(prompt(2, 6), **GREEDY, return_dict_in_generate=True, **values)
        return float((output.exit_layers[:, 1:] < LAYERS).float().mean())

    before = share()
    with model.cascade_replaced(CascadeConfig([rule(0), rule(2)])):
        assert share() == 1.0
        with model.cascade_replaced(CascadeConfig([rule(0, 0.0), rule(2, 0.0)])):
            assert share() == 0.0
        with model.cascade_replaced(None):
            assert share() == 1.0
    assert share() == before


def test_temperature_of_exits_shapes_what_is_sampled(llama: PreTrainedModel) -> None:
    values = {
        **GREEDY,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    output = wrap(llama, {1: "lens"}, [rule(1, temperature=2.5)]).generate(prompt(2, 6), **values)
    scores, logits = torch.stack(output.scores, 1), torch.stack(output.logits, 1)
    torch.testing.assert_close(scores[:, 0], logits[:, 0])
    expected = (logits[:, 1:] / 2.5).log_softmax(-1)
    torch.testing.assert_close(scores[:, 1:].log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
