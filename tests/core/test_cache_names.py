"""A cache is found under whatever name transformers gives it, and handed on under the right one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.cache_names import CACHE_NAMES, cache_in, cache_name, with_cache_as
from sedac_hf.errors import CacheError, ModeError
from tests.tiny_models import LAYERS, prompt
from tests.wrapping import rule, wrap

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def test_a_function_is_asked_for_its_own_name() -> None:
    def older(input_ids: Any, past_key_values: Any = None) -> None: ...
    def newer(input_ids: Any, cache: Any = None) -> None: ...
    def either(input_ids: Any, **kwargs: Any) -> None: ...

    assert cache_name(older) == "past_key_values"
    assert cache_name(newer) == "cache"
    assert cache_name(either) == cache_name(GenerationMixin.prepare_inputs_for_generation)


def test_every_architecture_is_asked(tiny: PreTrainedModel) -> None:
    """The name is the one under which the base puts its cache into its outputs."""
    output = tiny(prompt(1, 3), use_cache=True)
    name = cache_name(type(tiny).forward)
    assert output[name] is cache_in(output)
    shell = BaseShell(tiny)
    with torch.no_grad():
        _, calls = shell.prologue(input_ids=prompt(1, 1), **shell.cached(output[name]))
    assert all(shell.cache_of(call) is output[name] for call in calls)


@pytest.mark.parametrize("given", CACHE_NAMES)
@pytest.mark.parametrize("wanted", CACHE_NAMES)
def test_arguments_are_renamed(given: str, wanted: str) -> None:
    cache = object()
    assert with_cache_as(wanted, {given: cache, "use_cache": True}) == {
        wanted: cache,
        "use_cache": True,
    }
    assert with_cache_as(wanted, {given: None, "use_cache": True}) == {"use_cache": True}
    assert cache_in({given: cache}) is cache
    assert cache_in({}) is None


def test_one_cache_under_both_names_is_one() -> None:
    cache = object()
    both = dict.fromkeys(CACHE_NAMES, cache)
    assert with_cache_as("cache", both) == {"cache": cache}


@pytest.mark.parametrize("mode", ["off", "plain", "certified", "exact"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_users_may_give_it_under_either_name(llama: PreTrainedModel, name: str, mode: str) -> None:
    model = wrap(llama, {1: "block"})
    ids = prompt(2, 5)
    expected = model.generate(ids, **GREEDY, sedac_mode=mode)
    cache = DynamicCache(config=llama.config)
    found = model.generate(ids, **GREEDY, sedac_mode=mode, **{name: cache})
    assert torch.equal(found, expected)
    assert int(cache.get_seq_length()) == 5 + 5, "the cache that was given was used"
    assert len(cache.layers) >= LAYERS


@torch.no_grad()
@pytest.mark.parametrize("exits", [None, "off"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_takes_either_name(llama: PreTrainedModel, name: str, exits: str | None) -> None:
    model = wrap(llama, {1: "lens"}, [rule(1, 0.0)])
    ids, cache = prompt(1, 6), DynamicCache(config=llama.config)
    model(ids[:, :4], exits=exits, **{name: cache})
    found = model(ids[:, 4:], exits=exits, **{name: cache})
    assert cache_in(found) is cache
    torch.testing.assert_close(found.logits, llama(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ModeError, match="takes no cache"):
        model(ids, exits="simulate", **{name: cache})


def test_two_caches_are_one_too_many(llama: PreTrainedModel) -> None:
    model = wrap(llama)
    two = {name: DynamicCache(config=llama.config) for name in CACHE_NAMES}
    with pytest.raises(CacheError, match="Expected one cache, found two"):
        model(prompt(1, 3), **two)
    with pytest.raises(CacheError, match="Expected one cache, found two"):
        model.generate(prompt(1, 3), **GREEDY, **two)


@torch.no_grad()
def test_a_decoder_that_uses_another_name_is_understood(llama: PreTrainedModel) -> None:
    """Layers of transformers still take the older name; so may a decoder that calls them by it."""
    shell = BaseShell(llama)
    other = next(name for name in CACHE_NAMES if name != shell.cache_kwarg)

    class Older(type(llama.model)):
        """Calls its layers as decoders written for another version do."""

        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            cache = cache_in(given)
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=tables, **{other: cache})
            return SimpleNamespace(last_hidden_state=hidden)

    llama.model.__class__ = Older
    cache = DynamicCache(config=llama.config)
    _, calls = BaseShell(llama).prologue(input_ids=prompt(1, 3), **shell.cached(cache))
    assert all(shell.cache_of(call) is cache for call in calls)
