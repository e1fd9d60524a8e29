"""The wrapper as a model: modes, and a base that is left alone."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.config import SedacConfig
from sedac_hf.errors import ModeError, UnsupportedModelError
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, prompt
from tests.wrapping import wrap

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def test_off_is_bit_equal_to_the_base(tiny: PreTrainedModel) -> None:
    ids = prompt(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = tiny(ids, attention_mask=mask)
    tokens = tiny.generate(ids, attention_mask=mask, **GREEDY)
    model = wrap(tiny, {1: "block"}, mode="off")
    found = model(ids, attention_mask=mask)
    assert torch.equal(found.logits, expected.logits)
    assert type(found) is type(expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), tokens)
    assert model.exit_stats.tokens == 0


@torch.no_grad()
def test_plain_and_exact_give_the_tokens_of_the_base(tiny: PreTrainedModel) -> None:
    ids = prompt(2, 6)
    expected = tiny.generate(ids, **GREEDY, return_dict_in_generate=True, output_logits=True)
    model = wrap(tiny, {1: "block"})
    for mode in ("plain", "exact"):
        found = model.generate(
            ids, **GREEDY, sedac_mode=mode, return_dict_in_generate=True, output_logits=True
        )
        assert torch.equal(found.sequences, expected.sequences)
        # Several positions at once, or the native pass, sum in another order than single steps.
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
        assert (found.exit_layers == LAYERS).all()


@torch.no_grad()
def test_a_whole_sequence_runs_at_full_depth(tiny: PreTrainedModel) -> None:
    ids = prompt(2, 6)
    expected = tiny(ids).logits
    model = wrap(tiny, {1: "block"})
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids, exits="off").logits, expected)


@torch.no_grad()
def test_exits_disabled_is_the_base_in_this_thread_only(llama: PreTrainedModel) -> None:
    ids = prompt(1, 5)
    model = wrap(llama, {1: "lens"})
    exited = model.generate(ids, **GREEDY)
    expected = llama.generate(ids, **GREEDY)
    assert not torch.equal(exited, expected), "exits change nothing here: the test shows nothing"
    elsewhere: list[Tensor] = []
    with model.exits_disabled():
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        thread = threading.Thread(target=lambda: elsewhere.append(model.generate(ids, **GREEDY)))
        thread.start()
        thread.join()
    assert torch.equal(elsewhere[0], exited)
    assert torch.equal(model.generate(ids, **GREEDY), exited)


def test_unknown_and_refused_modes(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    with pytest.raises(ModeError, match="sedac_mode must be one of"):
        model.generate(prompt(1, 3), sedac_mode="fast")
    with pytest.raises(ModeError, match="exits must be None, 'off' or 'simulate'"):
        model(prompt(1, 3), exits="on")
    model.refused_modes["certified"] = "the base has other weights."
    with pytest.raises(ModeError, match="the base has other weights"):
        model.generate(prompt(1, 3), **GREEDY)
    assert model.generate(prompt(1, 3), sedac_mode="exact", **GREEDY).shape == (1, 11)


def test_without_exits_certified_runs_plain(llama: PreTrainedModel) -> None:
    ids = prompt(1, 4)
    model = SedacForCausalLM.from_base(llama)
    assert model.config.mode == "off"
    expected = llama.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, sedac_mode="certified"), expected)
    # Plain, not the base's own loop: where the native pass is admitted it is several times faster.
    assert model.exit_stats.runs_on == "native"
    with pytest.raises(ModeError, match="needs checkpoints and a cascade"):
        model(ids, exits="simulate")


def test_early_exit_assistant_is_refused_before_it_breaks_the_base(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    for mode in ("off", "plain", "certified"):
        with pytest.raises(ModeError, match="sedac_mode='exact'"):
            model.generate(prompt(1, 3), assistant_early_exit=2, sedac_mode=mode)
    config = copy.deepcopy(model.generation_config)
    config.assistant_early_exit = 2
    with pytest.raises(ModeError, match="assistant_early_exit=2"):
        model.generate(prompt(1, 3), generation_config=config)
    with pytest.raises(ModeError, match="assistant_early_exit=2"):
        model.generate(prompt(1, 3), config)
    assert llama.config.num_hidden_layers == LAYERS


def test_wrapping_leaves_weights_config_and_attention_alone(tiny: PreTrainedModel) -> None:
    before, config = state_of(tiny), tiny.config.to_dict()
    attention, experts = tiny.config._attn_implementation, tiny.config._experts_implementation
    modules = dict(tiny.named_modules())
    model = wrap(tiny, {0: "lens", 2: "block"})
    model.generate(prompt(2, 5), **GREEDY)
    assert attention is not None
    assert tiny.config._attn_implementation == attention
    assert tiny.config._experts_implementation == experts
    assert tiny.config.to_dict() == config
    assert dict(tiny.named_modules()) == modules
    after = tiny.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert model.config.text_config is tiny.config
    assert model.config._attn_implementation == attention


@torch.no_grad()
def test_attention_stays_causal(llama: PreTrainedModel) -> None:
    """A configuration built around a live one can switch its masks off in silence."""
    ids = prompt(1, 8)
    for build in (SedacConfig.from_base_config, lambda config: SedacConfig(text_config=config)):
        assert build(llama.config).text_config is llama.config
    first = llama(ids).logits[:, :4]
    changed = ids.clone()
    changed[:, 5:] = 3
    assert torch.equal(llama(changed).logits[:, :4], first)


def test_adapters_keep_their_weights(llama: PreTrainedModel) -> None:
    """The constructor of a composite model initialises what carries no mark of being loaded."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(llama, config)
    before = state_of(adapted)
    ids = prompt(2, 5)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    for base in (adapted, adapted.get_base_model()):
        model = wrap(base, {1: "block"})
        after = adapted.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            with model.exits_disabled():
                assert torch.equal(model(ids).logits, expected)
    assert model.generate(ids, **GREEDY).shape == (2, 13)
    assert model.exit_stats.exit_share > 0.8


def test_untied_weights_stay_untied(llama: PreTrainedModel) -> None:
    llama.config.tie_word_embeddings = True
    wrap(llama, {1: "lens"})
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight


def test_prompt_learning_adapters_are_refused(llama: PreTrainedModel) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="prompt-learning"):
        SedacForCausalLM.from_base(get_peft_model(llama, config))


def test_offloaded_base_generates(llama: PreTrainedModel) -> None:
    from accelerate import cpu_offload

    ids = prompt(2, 5)
    expected = wrap(llama, {1: "block"}).generate(ids, **GREEDY)
    plain = llama.generate(ids, **GREEDY)
    heads = wrap(llama, {1: "block"})
    parts = {"heads": list(heads.exit_heads), "probes": heads.probes}
    cpu_offload(llama)
    specs = heads.config.checkpoint_specs()
    model = SedacForCausalLM.from_base(llama, specs, heads.cascade, **parts)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **GREEDY, sedac_mode="plain"), plain)
    assert next(llama.parameters()).is_meta
