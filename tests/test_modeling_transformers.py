"""The wrapper as a model of transformers: types, embeddings, training, copies, Auto classes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline

from sedac_hf.config import SedacConfig
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, VOCABULARY, build_tiny, prompt
from tests.wrapping import rule, wrap

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


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
    import sedac_hf.testing
    from sedac_hf.core import CascadeController

    assert CascadeController is sedac_hf.core.cascade_controller.CascadeController
    for package in (sedac_hf, sedac_hf.core, sedac_hf.testing):
        for name in package.__all__:
            assert getattr(package, name) is not None
            assert name in dir(package)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
