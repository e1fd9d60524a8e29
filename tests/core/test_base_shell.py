"""The shell runs every architecture as the base does, and leaves the base as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from sedac_hf.core.base_shell import BaseShell, LayerCall
from sedac_hf.core.self_check import self_check
from sedac_hf.errors import SedacError, UnsupportedModelError
from tests.threads import in_threads
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, build_tiny, prompt


def layers_of(shell: BaseShell) -> Any:
    """The loop that runs every layer."""

    def loop(hidden: Tensor, calls: list[LayerCall]) -> Tensor:
        for i, call in enumerate(calls):
            hidden = shell.layer(i, hidden, call)
        return hidden

    return loop


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@torch.no_grad()
def test_forward_is_bit_equal_to_the_base(tiny: PreTrainedModel, cache: str) -> None:
    shell = BaseShell(tiny)
    ids = prompt(2, 9)

    def run(forward: Any) -> list[Tensor]:
        if cache == "none":
            return [forward(input_ids=ids, use_cache=False).logits]
        kind = DynamicCache if cache == "dynamic" else StaticCache
        size = {} if cache == "dynamic" else {"max_cache_len": 16}
        past = kind(config=tiny.config, **size)
        first = forward(input_ids=ids[:, :8], past_key_values=past, use_cache=True)
        second = forward(input_ids=ids[:, 8:], past_key_values=past, use_cache=True)
        return [first.logits, second.logits, *(layer.keys for layer in past.layers)]

    found = run(lambda **values: shell.run(layers_of(shell), **values))
    for ours, theirs in zip(found, run(tiny), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_padding_and_positions_reach_the_layers(tiny: PreTrainedModel) -> None:
    shell = BaseShell(tiny)
    ids = prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }
    assert torch.equal(shell.run(layers_of(shell), **values).logits, tiny(**values).logits)


@torch.no_grad()
def test_prologue_runs_no_layer(tiny: PreTrainedModel) -> None:
    shell = BaseShell(tiny)
    assert shell.returns_tuple == (tiny.config.model_type == "falcon")
    called = []
    hooks = [layer.register_forward_hook(lambda *a: called.append(1)) for layer in shell.layers]
    hidden, calls = shell.prologue(input_ids=prompt(2, 5))
    assert hidden.shape == (2, 5, WIDTH)
    assert len(calls) == LAYERS
    assert not called
    for hook in hooks:
        hook.remove()
    cacheless = [shell.with_cache(call, None) for call in calls]
    state = layers_of(shell)(hidden, cacheless)
    assert torch.equal(shell.logits(state), tiny(prompt(2, 5)).logits)


@torch.no_grad()
def test_logits_take_a_smaller_vocabulary(tiny: PreTrainedModel) -> None:
    shell = BaseShell(tiny)
    states = torch.randn(2, 3, WIDTH)
    rows = torch.arange(5, 25)
    head = tiny.get_output_embeddings()
    small = nn.Linear(head.in_features, len(rows), bias=False)
    small.weight.copy_(head.weight[rows])
    whole = shell.logits(states)
    assert whole.shape == (2, 3, VOCABULARY)
    torch.testing.assert_close(shell.logits(states, vocabulary=small), whole[..., rows])
    # The slow way through the whole decoder says the same.
    torch.testing.assert_close(shell._logits_through_decoder(states, small), whole[..., rows])
    assert tiny.get_output_embeddings() is head


def test_the_base_is_left_as_it_was(tiny: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    modules = dict(tiny.named_modules())
    config = tiny.config.to_dict()
    attention = tiny.config._attn_implementation
    shell = BaseShell(tiny)
    self_check(shell)
    with torch.no_grad():
        shell.logits(torch.randn(1, 1, WIDTH))
    assert dict(tiny.named_modules()) == modules
    assert tiny.config.to_dict() == config
    assert tiny.config._attn_implementation == attention
    assert all(not module._forward_hooks for module in tiny.modules())
    after = tiny.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@torch.no_grad()
def test_replaced_modules_and_flags_are_noticed(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    ids = prompt(1, 4)
    shell.run(layers_of(shell), input_ids=ids)
    llama.model.layers[1] = copy.deepcopy(llama.model.layers[2])
    llama.model.layers[1].self_attn.layer_idx = 1
    llama.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    assert torch.equal(shell.run(layers_of(shell), input_ids=ids).logits, llama(ids).logits)
    llama.resize_token_embeddings(VOCABULARY + 8)
    assert shell.run(layers_of(shell), input_ids=ids).logits.shape[-1] == VOCABULARY + 8


@torch.no_grad()
def test_hidden_states_are_captured_inside_the_loop(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    ids = prompt(1, 4)
    found = shell.run(layers_of(shell), input_ids=ids, output_hidden_states=True).hidden_states
    expected = llama(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == LAYERS + 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_gradients_flow_through_the_shell(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    ids = prompt(2, 6)
    shell.run(layers_of(shell), input_ids=ids, labels=ids).loss.backward()
    ours = {name: value.grad.clone() for name, value in llama.named_parameters()}
    llama.zero_grad()
    llama(ids, labels=ids).loss.backward()
    for name, value in llama.named_parameters():
        torch.testing.assert_close(ours[name], value.grad)


def test_threads_do_not_mix(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    prompts = [prompt(1, 5 + i, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [llama(ids).logits for ids in prompts]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                found = shell.run(layers_of(shell), input_ids=prompts[i]).logits
                if not torch.equal(found, expected[i]):
                    wrong.append(i)

    in_threads(work, 4)
    assert not wrong


def test_dispatch_by_accelerate_still_works(llama: PreTrainedModel) -> None:
    from accelerate import cpu_offload

    ids = prompt(1, 5)
    with torch.no_grad():
        expected = llama(ids).logits
    cpu_offload(llama)
    assert next(llama.parameters()).is_meta
    shell = BaseShell(llama)
    self_check(shell)
    with torch.no_grad():
        assert torch.equal(shell.run(layers_of(shell), input_ids=ids).logits, expected)
    assert next(llama.parameters()).is_meta, "weights stayed on the device"


def test_a_layer_that_is_dropped_in_training_is_an_error() -> None:
    base = build_tiny("opt", layerdrop=1.0).train()
    with pytest.raises(SedacError, match=r"did not call its last|never called its first"):
        BaseShell(base).run(lambda hidden, calls: hidden, input_ids=prompt(1, 4))


def test_the_self_check_refuses_a_decoder_that_does_more(llama: PreTrainedModel) -> None:
    class Scaling(type(llama.model)):
        """A decoder that does something of its own between its layers."""

        def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
            past_key_values = past_key_values or DynamicCache(config=self.config)
            hidden = self.embed_tokens(input_ids)
            places = torch.arange(input_ids.shape[1])[None] + past_key_values.get_seq_length()
            for layer in self.layers:
                tables = self.rotary_emb(hidden, places)
                hidden = 1.5 * layer(
                    hidden, position_embeddings=tables, past_key_values=past_key_values
                )
            return BaseModelOutputWithPast(
                last_hidden_state=self.norm(hidden), past_key_values=past_key_values
            )

    llama.model.__class__ = Scaling
    with pytest.raises(UnsupportedModelError, match="changes the logits"):
        self_check(BaseShell(llama))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("T5ForConditionalGeneration", "T5Config", "encoder-decoder"),
        ("MambaForCausalLM", "MambaConfig", "recurrent state"),
        ("BertModel", "BertConfig", "num_hidden_layers|decoder"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(name: str, config: str, message: str) -> None:
    import transformers

    kind = getattr(transformers, name)
    settings = {"T5Config": {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = settings.get(config, {**small, "intermediate_size": 16})
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        BaseShell(kind(getattr(transformers, config)(vocab_size=32, **values)))
    assert name.removesuffix("Model") in str(caught.value)


def test_something_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Expected a transformers causal LM"):
        BaseShell(nn.Linear(2, 2))


@torch.no_grad()
def test_it_can_be_copied_with_its_base(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    shell.run(layers_of(shell), input_ids=prompt(1, 4))
    twin = copy.deepcopy(shell)
    assert twin.base is not llama
    twin.base.lm_head.weight.zero_()
    assert not twin.run(layers_of(twin), input_ids=prompt(1, 4)).logits.any()
    assert shell.run(layers_of(shell), input_ids=prompt(1, 4)).logits.any()
