"""What transformers calls the cache: `past_key_values` up to 5.23, `cache` after it.

Nobody looks at version numbers: each function is asked for the name that it takes itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationMixin

from sedac_hf.errors import CacheError

__all__ = ["CACHE_NAMES", "cache_in", "cache_name", "with_cache_as"]

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(function: Callable[..., Any]) -> str:
    """The name under which a function takes its cache.

    Args:
        function: A forward, or another function of a model that takes a cache.

    Returns:
        The name among its parameters; that of transformers' own `generate` if neither is.
    """
    for asked in (function, GenerationMixin.prepare_inputs_for_generation):
        parameters = inspect.signature(asked).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
    raise AssertionError("prepare_inputs_for_generation of transformers names no cache")


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among the arguments or the outputs of a call, or None.

    Args:
        values: Arguments by name, or an output object of transformers.
    """
    found = (values[name] for name in CACHE_NAMES if name in values)
    return next((cache for cache in found if cache is not None), None)


def with_cache_as(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with the cache under one name, whichever it was given under.

    Args:
        name: The name that the callee takes.
        values: Arguments by name.

    Raises:
        CacheError: If two different caches were given.
    """
    given = [values[other] for other in CACHE_NAMES if values.get(other) is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise CacheError(
            f"Expected one cache, found two, as {' and as '.join(CACHE_NAMES)}. Give one, under "
            "either name."
        )
    others = {key: value for key, value in values.items() if key not in CACHE_NAMES}
    return {**others, name: given[0]} if given else others
