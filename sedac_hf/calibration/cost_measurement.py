"""Measure what probes, tries and exits cost on the machine at hand, by real generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.costs import CheckpointCost, CostModel
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.benchmark import encode_prompts, greedy_settings, keep_stats, timed_call
from sedac_hf.generation.exit_governor import exits_always_act

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["measure_costs", "probing_cascades", "solve_costs"]

# Every finite risk is far below it, so every row tries.
_ALWAYS = 1e30


def measure_costs(
    model: SedacForCausalLM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: int = 24,
    rounds: int = 3,
    max_prompts: int = 2,
) -> CostModel:
    """Time generation under cascades that always or never try and exit, and solve for the costs.

    Counting parameters leaves out what small products and Python cost; on a small model that is as
    much as a layer. The prompt's pass is timed alone and taken off.

    Args:
        model: A wrapped model with exit heads, on the device and in the data type of use.
        prompts: Token ids, or texts together with a tokenizer.
        tokenizer: Turns texts into token ids.
        new_tokens: Tokens of each timed call, at least 2.
        rounds: Rounds after a warm-up; all cascades take turns in each.
        max_prompts: Most prompts to use.

    Returns:
        Costs in fractions of a plain decode step; the head's share is that of its weights.

    Raises:
        CalibrationError: If the model has no exit heads or an argument is out of range.
    """
    specs = model.config.checkpoint_specs()
    if not specs:
        raise CalibrationError(
            "the model has no exit heads, so there is nothing to measure; fit some with "
            "sedac_hf.fit."
        )
    if new_tokens < 2 or rounds < 1:
        raise CalibrationError(
            f"new_tokens must be at least 2 and rounds at least 1, found {new_tokens}, {rounds}."
        )
    inputs = [ids.to(model.device) for ids in encode_prompts(prompts, tokenizer, max_prompts)]
    cascades = probing_cascades([spec.layer_idx for spec in specs])
    arms: dict[str, CascadeConfig | None] = {"prompt": None, "plain": None, **cascades}
    seconds = {name: np.empty((rounds, len(inputs))) for name in arms}
    with keep_stats(model):
        for turn in range(-1, rounds):  # round -1 warms up and is not kept
            for at, ids in enumerate(inputs):
                for name, cascade in arms.items():
                    tokens = 1 if name == "prompt" else new_tokens
                    spent = _time(model, ids, cascade, tokens)
                    if turn >= 0:
                        seconds[name][turn, at] = spent
    steps = {
        name: float(np.median(times - seconds["prompt"])) / (new_tokens - 1)
        for name, times in seconds.items()
        if name != "prompt"
    }
    counted = CostModel.from_base(
        model.base_lm, specs, probe_rank=model.config.probe_rank, draft_vocabulary=_draft(model)
    )
    return solve_costs(steps, counted)


def probing_cascades(layers: Sequence[int]) -> dict[str, CascadeConfig]:
    """Cascades under which each cost shows.

    Args:
        layers: Layers of the checkpoints.

    Returns:
        `"closed"`, in which no checkpoint tries, and for checkpoint k `"fail k"` (always tries,
        never sure enough), `"exit k"` (always exits, no probability asked for) and `"sure k"` (the
        same, with the probability worked out).
    """
    never = [LayerConfig(layer, 0.0, decay=0.0, exit_confidence=2.0) for layer in layers]
    cascades = {"closed": CascadeConfig(never)}
    for k in range(len(layers)):
        always = replace(never[k], threshold=_ALWAYS, exit_confidence=0.0)
        for name, least in (("fail", 1.0), ("exit", 0.0), ("sure", 1e-30)):
            rules = [*never[:k], replace(always, min_probability=least), *never[k + 1 :]]
            cascades[f"{name} {k}"] = CascadeConfig(rules)
    return cascades


def solve_costs(steps: Mapping[str, float], counted: CostModel) -> CostModel:
    """Costs from the time of a decode step under each cascade.

    Args:
        steps: Seconds of a decode step in `"plain"` and under each of `probing_cascades`.
        counted: Costs by parameters; they say how what is only seen in sum is divided.

    Returns:
        The costs, none of them negative.
    """
    plain = steps["plain"]
    waiting = max(0.0, steps["closed"] / plain - 1.0)
    known = sum(c.probe + c.fill for c in counted.checkpoints)
    probe, fill = (
        np.array([waiting * getattr(c, name) / known for c in counted.checkpoints])
        for name in ("probe", "fill")
    )
    found = []
    for k, checkpoint in enumerate(counted.checkpoints):
        fail, leave, sure = (steps[f"{name} {k}"] / plain for name in ("fail", "exit", "sure"))
        gate = max(0.0, sure - leave)
        attempt = max(0.0, fail - 1.0 - waiting + fill[k] - gate)
        # A token that leaves is still probed before, and fills the other heads' K/V.
        spent = probe[: k + 1].sum() + fill.sum() - fill[k] + attempt
        found.append(
            CheckpointCost(
                layer_idx=checkpoint.layer_idx,
                probe=float(probe[k]),
                fill=float(fill[k]),
                attempt=float(attempt),
                gate=float(gate),
                saved=float(max(0.0, 1.0 + spent - leave)),
            )
        )
    return CostModel(tuple(found), head=counted.head, depth=counted.depth, source="measured")


def _time(
    model: SedacForCausalLM, ids: Tensor, cascade: CascadeConfig | None, tokens: int
) -> float:
    settings = greedy_settings(model, tokens)
    mode = "plain" if cascade is None else "certified"

    def call(prompt: Tensor) -> Any:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), sedac_mode=mode, **settings
        )

    # A governor would leave exits that lose time alone, and what they cost would not be seen.
    with model.cascade_replaced(cascade), exits_always_act():
        return timed_call(call, ids)


def _draft(model: SedacForCausalLM) -> int:
    return 0 if model.draft_vocabulary is None else len(model.draft_vocabulary)
