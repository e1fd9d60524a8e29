"""What transformers itself offers to write faster, as arms of a benchmark.

Early-exit drafting lowers the number of layers in the base's live configuration and leaves it so
after an error; here it is always put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sedac_hf.evaluation.arms import Arm, Batch, base_arm
from sedac_hf.evaluation.benchmark import greedy_settings, take_turns

if TYPE_CHECKING:
    from torch import Tensor

    from sedac_hf.modeling import SedacForCausalLM

__all__ = [
    "LOOKUP_TOKENS",
    "EarlyExitSearch",
    "best_early_exit",
    "early_exit_arm",
    "lookup_arm",
    "reason_against",
    "unharmed",
]

LOOKUP_TOKENS = 10
# Depths tried for early-exit drafting, as shares of the layers.
_DEPTHS = (1 / 8, 1 / 4, 1 / 2)
# What transformers' generation raises on architectures that it does not know to handle.
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class EarlyExitSearch:
    """Which layer early-exit drafting is fastest with.

    Attributes:
        layer: The layer; None where it works with none.
        seconds_per_token: What was measured, by layer.
        reason: Why it does not work; None where it does.
    """

    layer: int | None
    seconds_per_token: dict[int, float]
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """The search as plain JSON values."""
        return asdict(self)


@contextmanager
def unharmed(base: Any) -> Iterator[None]:
    """Put back, whatever happens, what drafting changes in a live base.

    Args:
        base: The base model.
    """
    inner = getattr(base, str(getattr(base, "base_model_prefix", "")), base)
    configs = {id(config): config for config in (base.config.get_text_config(), inner.config)}
    layers = {key: config.num_hidden_layers for key, config in configs.items()}
    settings = vars(base.generation_config) if base.generation_config is not None else {}
    before = dict(settings)
    try:
        yield
    finally:
        for key, config in configs.items():
            config.num_hidden_layers = layers[key]
        settings.clear()
        settings.update(before)


def early_exit_arm(model: SedacForCausalLM, layer: int, settings: dict[str, Any]) -> Arm:
    """The base with `assistant_early_exit`; it is called on the base, since the wrapper refuses it.

    Args:
        model: The wrapped model.
        layer: Number of layers that draft.
        settings: Arguments of `generate`.
    """
    return _guarded(model, base_arm(model, settings, assistant_early_exit=layer))


def lookup_arm(model: SedacForCausalLM, settings: dict[str, Any]) -> Arm:
    """The base with `prompt_lookup_num_tokens`.

    Args:
        model: The wrapped model.
        settings: Arguments of `generate`.
    """
    return _guarded(model, base_arm(model, settings, prompt_lookup_num_tokens=LOOKUP_TOKENS))


def _guarded(model: SedacForCausalLM, arm: Arm) -> Arm:
    def write(batch: Batch) -> Tensor:
        with unharmed(model.base_lm):
            arm(batch)
        return arm.texts[batch.index]

    return Arm(write)


def reason_against(arm: Arm, batch: Batch) -> str | None:
    """Try an arm once.

    Args:
        arm: What transformers offers.
        batch: A batch to try it on.

    Returns:
        Why it cannot be used here, or None.
    """
    try:
        arm(batch)
    except _FAILURES as error:
        first = next(iter(str(error).splitlines()), "")
        return f"{type(error).__name__}: {first}"
    return None


def best_early_exit(
    model: SedacForCausalLM, batches: Sequence[Batch], tokens: int
) -> EarlyExitSearch:
    """Try a few layers on a few prompts.

    Args:
        model: The wrapped model.
        batches: Batches of one prompt.
        tokens: Tokens to write for each.

    Returns:
        The fastest layer, or why there is none.
    """
    settings = greedy_settings(model, tokens)
    depth = int(model.base_lm.config.get_text_config().num_hidden_layers)
    layers = sorted({max(1, round(share * depth)) for share in _DEPTHS if depth > 1})
    arms = {layer: early_exit_arm(model, layer, settings) for layer in layers}
    reasons = {layer: reason_against(arm, batches[0]) for layer, arm in arms.items()}
    working = {str(layer): arms[layer] for layer in layers if reasons[layer] is None}
    if not working:
        reason = next(iter(reasons.values()), None) or f"the base has {depth} layer"
        return EarlyExitSearch(None, {}, reason)
    # Trying them has warmed them up.
    seconds = take_turns(model, working, batches, rounds=1, warm_up=0)
    pace = {int(layer): float(np.sum(spent)) for layer, spent in seconds.items()}
    written = {layer: sum(map(arms[layer].new_tokens, batches)) for layer in pace}
    per_token = {layer: pace[layer] / max(written[layer], 1) for layer in pace}
    return EarlyExitSearch(min(per_token, key=per_token.__getitem__), per_token, None)
