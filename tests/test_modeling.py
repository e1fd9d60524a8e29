"""The wrapper as a model: off is the base, wrapping changes nothing, bad parts are refused."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

from sedac_hf.config import CheckpointSpec, SedacConfig
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.errors import ConfigError, ModeError, UnsupportedModelError
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, build_tiny, prompt
from tests.wrapping import rule, spec_of, wrap

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- off, plain, exact ----------------------------------------------------------------------------


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


def test_without_exits_certified_runs_as_the_base(llama: PreTrainedModel) -> None:
    ids = prompt(1, 4)
    model = SedacForCausalLM.from_base(llama)
    assert model.config.mode == "off"
    expected = llama.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, sedac_mode="certified"), expected)
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


# --- the base is left alone -----------------------------------------------------------------------


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


# --- parts that do not fit ------------------------------------------------------------------------


def test_a_checkpoint_beyond_the_depth_is_refused(llama: PreTrainedModel) -> None:
    for layer in (LAYERS - 1, LAYERS, 40):
        with pytest.raises(ConfigError, match=f"after layer {layer} leaves nothing to skip"):
            SedacForCausalLM.from_base(llama, [spec_of(layer, "lens")])
    with pytest.raises(ConfigError, match="template_layer 9 does not exist"):
        SedacForCausalLM.from_base(llama, [CheckpointSpec(1, template_layer=9)])


def test_checkpoints_that_are_repeated_or_unordered_are_refused(llama: PreTrainedModel) -> None:
    for layers in ((1, 1), (2, 0)):
        specs = [spec_of(layer, "lens") for layer in layers]
        with pytest.raises(ConfigError, match="increasing order"):
            SedacForCausalLM.from_base(llama, specs)


def test_heads_and_probes_of_another_width_are_refused(llama: PreTrainedModel) -> None:
    spec = spec_of(1, "lens")
    with pytest.raises(ConfigError, match="probe after layer 1 works on states of width 48"):
        SedacForCausalLM.from_base(llama, [spec], probes=ProbeManager.build(1, 48, 4))
    wide = build_tiny("llama", hidden_size=48, intermediate_size=64)
    for kind in ("lens", "block"):
        heads = list(wrap(wide, {1: kind}).exit_heads)
        with pytest.raises(ConfigError, match="head after layer 1 works on states of width 48"):
            SedacForCausalLM.from_base(llama, [spec_of(1, kind)], heads=heads)


def test_a_number_of_parts_that_differs_is_refused(llama: PreTrainedModel) -> None:
    heads = list(wrap(llama, {1: "lens"}).exit_heads)
    specs = [spec_of(0, "lens"), spec_of(1, "lens")]
    with pytest.raises(ConfigError, match="one head and one probe for each checkpoint"):
        SedacForCausalLM.from_base(llama, specs, heads=heads)
    with pytest.raises(ConfigError, match="one head and one probe for each checkpoint"):
        SedacForCausalLM.from_base(llama, specs[1:], probes=ProbeManager.build(2, WIDTH, 4))


def test_a_cascade_for_other_checkpoints_is_refused(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    other = CascadeConfig([rule(2)])
    with pytest.raises(ConfigError, match=r"after layers \[2\], but the model has"):
        model.set_cascade(other)
    with pytest.raises(ConfigError, match=r"after layers \[2\]"), model.cascade_replaced(other):
        pass


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([3, 3]), "more than once"),
        (torch.tensor([3, VOCABULARY]), f"from 3 to {VOCABULARY}"),
        (torch.tensor([-1, 3]), "from -1 to 3"),
        (torch.tensor([3.0]), "int64"),
        (torch.tensor([], dtype=torch.long), "non-empty"),
    ],
)
def test_a_bad_draft_vocabulary_is_refused(
    llama: PreTrainedModel, tokens: Tensor, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(llama, {1: "lens"}, draft_vocabulary=tokens)


def test_exit_start_of_another_length_is_refused(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    with pytest.raises(ConfigError, match="one per row"):
        model(prompt(3, 5), exits="simulate", exit_start=torch.tensor([1, 2]))
    cache = llama(prompt(1, 2)).past_key_values
    with pytest.raises(ModeError, match="takes no cache"):
        model(prompt(1, 5), exits="simulate", past_key_values=cache)


def test_a_configuration_without_a_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_config is missing"):
        SedacForCausalLM(SedacConfig())


# --- as a model of transformers -------------------------------------------------------------------


def test_dtype_and_device_are_those_of_the_base() -> None:
    base = build_tiny("llama", dtype=torch.bfloat16)
    model = wrap(base, {1: "block"})
    assert model.dtype == torch.bfloat16
    assert model.device == base.device
    assert model.exit_heads[0].mix.weight.dtype == torch.bfloat16
    assert model.probes.probes[0].project.weight.dtype == torch.float32
    assert model.generate(prompt(1, 4), **GREEDY).shape == (1, 12)


def test_casting_leaves_the_probes_as_precise_as_they_were(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    before = model.probes.probes[0].project.weight.clone()
    model.to(torch.bfloat16)
    assert llama.dtype == torch.bfloat16
    assert model.exit_heads[0].mix.weight.dtype == torch.bfloat16
    assert torch.equal(model.probes.probes[0].project.weight, before)
    assert model.generate(prompt(1, 4), **GREEDY).shape == (1, 12)


def test_embeddings_decoder_and_settings_are_the_bases(tiny: PreTrainedModel) -> None:
    model = wrap(tiny, {1: "lens"})
    assert model.get_input_embeddings() is tiny.get_input_embeddings()
    assert model.get_output_embeddings() is tiny.get_output_embeddings()
    assert model.get_decoder() is tiny.get_decoder()
    assert model.base is tiny
    assert model.generation_config is tiny.generation_config
    assert model.config.get_text_config() is tiny.config
    assert model.can_generate()


@torch.no_grad()
def test_a_resized_vocabulary_reaches_the_draft_head(llama: PreTrainedModel) -> None:
    draft = torch.arange(3, 40)
    model = wrap(llama, {1: "lens"}, draft_vocabulary=draft)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert llama.get_input_embeddings().weight.shape[0] == VOCABULARY + 8
    llama.lm_head.weight.mul_(2)
    model.generate(prompt(1, 4), **GREEDY)
    linear = model.assembly.parts.draft.linear
    assert linear is not None
    assert torch.equal(linear.weight, llama.lm_head.weight[draft])


def test_what_inference_mode_prepared_serves_training_mode_too(llama: PreTrainedModel) -> None:
    rules = [rule(1, min_probability=1e-6)]
    values = {"draft_vocabulary": torch.arange(3, 60)}
    model = wrap(llama, {1: "block"}, rules, **values)
    with torch.no_grad():
        llama.model.layers[2].self_attn.k_proj.weight.mul_(1.1)
        llama.lm_head.weight.mul_(1.1)
    with torch.inference_mode():
        expected = model.generate(prompt(1, 5), **GREEDY).clone()
    assert model.assembly.fill.is_stacked
    output, ids = model(prompt(1, 5)), prompt(1, 5)
    for _ in range(8):
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        output = model(ids[:, -1:], past_key_values=output.past_key_values)
    assert output.logits.requires_grad
    assert torch.equal(ids, expected)


def test_a_head_that_is_no_plain_layer_is_used_whole(llama: PreTrainedModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"]), llama)
    rules = [rule(1, min_probability=1e-4)]
    model = wrap(llama, {1: "lens"}, rules, draft_vocabulary=torch.arange(3, 40))
    assert model.assembly.parts.draft.linear is None
    model.generate(prompt(1, 4), **GREEDY)
    assert model.exit_stats.exit_share > 0.5


def test_labels_give_the_loss_of_what_was_run(llama: PreTrainedModel) -> None:
    ids = prompt(2, 8)
    model = wrap(llama, {1: "lens"})
    assert torch.equal(model(ids, labels=ids).loss, llama(ids, labels=ids).loss)
    simulated = model(ids, labels=ids, exits="simulate")
    logits = simulated.logits[:, :-1].reshape(-1, VOCABULARY)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1))
    torch.testing.assert_close(simulated.loss, expected)
    kept = model(ids, exits="simulate", logits_to_keep=3)
    assert torch.equal(kept.logits, simulated.logits[:, -3:])
    assert kept.exit_layers.shape == (2, 8)


def test_it_trains_through_the_wrapper(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"}).train()
    ids = prompt(2, 6)
    model(ids, labels=ids).loss.backward()
    assert llama.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_hidden_states_and_attentions_are_the_bases(tiny: PreTrainedModel) -> None:
    tiny.set_attn_implementation("eager")
    ids = prompt(1, 5)
    model = wrap(tiny, {1: "block"})
    found = model(ids, output_hidden_states=True, output_attentions=True)
    expected = tiny(ids, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == LAYERS + 1
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert all(map(torch.equal, found.attentions, expected.attentions))


def test_the_attention_implementation_can_be_changed(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    before = model.generate(prompt(2, 5), **GREEDY)
    model.set_attn_implementation("eager")
    assert llama.config._attn_implementation == "eager"
    assert torch.equal(model.generate(prompt(2, 5), **GREEDY), before)


def test_it_can_be_copied_and_pickled(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "block"})
    ids = prompt(2, 5)
    expected = model.generate(ids, **GREEDY)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(ids, **GREEDY), expected)
        assert twin.base is not llama
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).generate(ids, **GREEDY), expected)


def test_it_can_be_built_from_its_configuration(llama: PreTrainedModel) -> None:
    config = wrap(llama, {1: "block"}).config
    again = SedacConfig.from_dict(config.to_dict())
    assert again.checkpoint_specs() == config.checkpoint_specs()
    assert type(again.text_config) is type(llama.config)
    model = AutoModelForCausalLM.from_config(again)
    assert isinstance(model, SedacForCausalLM)
    assert model.config.text_config is model.base.config
    assert model(prompt(1, 4)).logits.shape == (1, 4, VOCABULARY)


def test_auto_classes_know_the_model() -> None:
    assert AutoConfig.for_model("sedac").model_type == "sedac"
    assert AutoModelForCausalLM._model_mapping[SedacConfig] is SedacForCausalLM


@pytest.mark.parametrize(
    "order",
    [
        "import sedac_hf; from transformers import AutoConfig",
        "from transformers import AutoConfig; import sedac_hf",
        "import sedac_hf.config; from transformers import AutoConfig",
        "import sedac_hf; import transformers; AutoConfig = transformers.AutoConfig",
    ],
)
def test_registration_happens_in_whatever_order_things_are_imported(order: str) -> None:
    code = f"{order}; print(AutoConfig.for_model('sedac').__class__.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SedacConfig"


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, sedac_hf; sedac_hf.__version__; sedac_hf.SedacError; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pipeline_takes_the_object(llama: PreTrainedModel, micro_model: Any) -> None:
    model = wrap(micro_model.model, {2: "block"})
    run = pipeline("text-generation", model=model, tokenizer=micro_model.tokenizer)
    text = run("k0a k0b", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("k0a k0b")
    assert model.exit_stats.exit_share > 0


def test_public_names_can_be_imported() -> None:
    import sedac_hf
    import sedac_hf.core
    from sedac_hf.core import CascadeController

    assert CascadeController is sedac_hf.core.cascade_controller.CascadeController
    for package in (sedac_hf, sedac_hf.core):
        for name in package.__all__:
            assert getattr(package, name) is not None
            assert name in dir(package)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
