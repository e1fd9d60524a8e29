"""Speed of certified exits under different rules, all beside plain in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.evaluation.benchmark import (
    Ratio,
    encode_prompts,
    greedy_settings,
    ratio_of,
    take_turns,
)
from sedac_hf.generation.exit_governor import exits_always_act

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["speeds_of_rules"]


def speeds_of_rules(
    model: SedacForCausalLM,
    rules: Mapping[str, CascadeConfig],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    rounds: int,
    max_prompts: int,
    seed: int,
) -> dict[str, Ratio]:
    """Time real `generate` calls under each of some rules, exits acting whether they pay or not.

    Args:
        model: The wrapped model.
        rules: Rules by name.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens of each call.
        rounds: Rounds that count.
        max_prompts: Most prompts that are timed.
        seed: Seed of the intervals.

    Returns:
        Speed against plain, by name.
    """
    inputs = [ids.to(model.device) for ids in encode_prompts(prompts, None, max_prompts)]
    settings = greedy_settings(model, max_new_tokens)

    def arm(mode: str, cascade: CascadeConfig | None) -> Callable[[Tensor], Any]:
        def call(ids: Tensor) -> Any:
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **settings}
            with model.cascade_replaced(cascade), exits_always_act():
                return model.generate(**given, sedac_mode=mode)

        return call

    arms = {"plain": arm("plain", None)}
    arms |= {name: arm("certified", cascade) for name, cascade in rules.items()}
    seconds = take_turns(model, arms, inputs, rounds=rounds)
    plain = seconds.pop("plain")
    return {name: ratio_of(plain / times, seed) for name, times in seconds.items()}
