"""Wrapped tiny models with heads and probes that do something, and the same exits by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.config import CheckpointSpec
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.modeling import SedacForCausalLM
from tests.slow_reference import SlowReference, Walk

NEW = 7  # new tokens; beyond the sliding windows of the tiny models
ALWAYS = 1e9  # a threshold at which every finite risk is safe


def spec_of(layer: int, kind: str) -> CheckpointSpec:
    """A checkpoint of one of the kinds `lens`, `block`, `deep` (two layers) and `feedback`."""
    if kind == "lens":
        return CheckpointSpec(layer, "lens", lens_rank=4)
    layers = 2 if kind == "deep" else 1
    return CheckpointSpec(layer, "block", num_layers=layers, feedback=kind == "feedback")


def rule(layer: int, threshold: float = ALWAYS, **fields: float) -> LayerConfig:
    """A checkpoint's rule under which a risk below half the threshold leaves."""
    return LayerConfig(layer, threshold, **fields)


def wrap(
    base: PreTrainedModel,
    kinds: dict[int, str] | None = None,
    rules: Sequence[LayerConfig] | None = None,
    **values: Any,
) -> SedacForCausalLM:
    """Wrap a base with randomised heads and probes; every decode step leaves unless told otherwise.

    Args:
        base: The base.
        kinds: Layer -> kind of head, see `spec_of`.
        rules: Rules of the checkpoints.
        **values: Passed on to `from_base`.
    """
    kinds = kinds or {1: "lens"}
    specs = [spec_of(layer, kind) for layer, kind in kinds.items()]
    cascade = CascadeConfig(list(rules or [rule(layer) for layer in kinds]))
    values = {"self_check": False, **values}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SedacForCausalLM.from_base(base, specs, cascade, **values)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in (model.exit_heads, model.probes):
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.add_(noise.to(parameter.device, parameter.dtype))
    return model


def head_by_hand(
    model: SedacForCausalLM, k: int, reference: SlowReference
) -> Callable[..., Tensor]:
    """The formula of head `k`, applied to whole sequences without a cache."""
    head: Any = model.exit_heads[k]

    def unit(states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)

    def apply(states: Tensor, arguments: dict[str, Any], before: Tensor | None) -> Tensor:
        if head.spec.head == "lens":
            low = unit(states) @ head.down.weight.T
            return states + low @ head.up.weight.T + head.up.bias
        given = unit(states)
        if head.spec.feedback:
            given = torch.cat([given, unit(before)], -1)
        found = states + given @ head.mix.weight.T
        for layer in head.layers:
            found = reference.run_fresh(layer, found, arguments)
        return found

    return apply


class CascadeByHand:
    """The rule of exits in plain torch."""

    def __init__(self, model: SedacForCausalLM, eligible: Tensor, reference: SlowReference) -> None:
        self._model = model
        self._eligible = eligible
        self._reference = reference
        self._confidence: Any = 0.0
        self._most = 0.0

    def __call__(self, k: int, states: Tensor, exits: Tensor) -> Tensor:
        assert self._model.cascade is not None
        layer = self._model.cascade.layers[k]
        if k == 0:
            self._confidence, self._most = 0.0, 0.0
        risk = self._risk(k, states)
        confidence = ((layer.threshold - risk) / layer.threshold).clamp(0, 1)
        self._confidence = layer.decay * self._confidence + layer.weight * confidence
        self._most = layer.decay * self._most + layer.weight
        leaving = self._confidence / self._most >= layer.exit_confidence
        if layer.min_probability > 0:
            logits = self._reference.logits(exits)
            if self._model.draft_vocabulary is not None:
                logits = logits[..., self._model.draft_vocabulary]
            leaving &= logits.softmax(-1).amax(-1) >= layer.min_probability
        return leaving & self._eligible

    def _risk(self, k: int, states: Tensor) -> Tensor:
        probe: Any = self._model.probes.probes[k]
        low = states @ probe.project.weight.T
        low = (low - low.mean(-1, keepdim=True)) * torch.rsqrt(
            low.var(-1, unbiased=False, keepdim=True) + probe.norm.eps
        )
        low = low * probe.norm.weight + probe.norm.bias
        score = (low * probe.out.weight[0]).sum(-1) + probe.out.bias
        return torch.log1p(score.exp())


@torch.no_grad()
def exits_by_hand(
    model: SedacForCausalLM, ids: Tensor, start: int, mask: Tensor | None = None
) -> Walk:
    """What the model must do on whole sequences, positions from `start` on being decode steps."""
    reference = SlowReference(model.base)
    layers = [spec.layer_idx for spec in model.config.checkpoint_specs()]

    def walk(stop: int, before: Tensor | None) -> Walk:
        part = ids[:, :stop]
        eligible = (torch.arange(stop) >= start).expand(part.shape)
        decide = CascadeByHand(model, eligible, reference)
        heads = {
            layer: partial(head_by_hand(model, k, reference), before=before)
            for k, layer in enumerate(layers)
        }
        return reference.walk(part, None if mask is None else mask[:, :stop], heads, decide)

    if not any(spec.feedback for spec in model.config.checkpoint_specs()):
        return walk(ids.shape[1], None)
    # With feedback each position needs the outcome of the one before it.
    found = walk(1, torch.zeros((ids.shape[0], 1, model.base.config.hidden_size)))
    for stop in range(2, ids.shape[1] + 1):
        before = torch.cat([torch.zeros_like(found.outputs[:, :1]), found.outputs], dim=1)
        if mask is not None:
            seen = torch.nn.functional.pad(mask, (1, 0))[:, :stop]
            before = before * seen[..., None]
        found = walk(stop, before)
    return found


def generated(model: SedacForCausalLM, ids: Tensor, sample: bool = False, **values: Any) -> Any:
    """Generate; sampled text of a random model is more varied than its greedy text."""
    torch.manual_seed(11)
    choice = {"temperature": 2.0, "top_k": 0} if sample else {}
    return model.generate(
        ids,
        max_new_tokens=NEW,
        do_sample=sample,
        **choice,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **values,
    )


def mixed(
    base: PreTrainedModel,
    kinds: dict[int, str],
    ids: Tensor,
    temperature: float = 1.0,
    **values: Any,
) -> tuple[SedacForCausalLM, Any]:
    """A model under whose rules some tokens leave and others do not, and what it generated."""
    plain = wrap(base, kinds, [rule(layer, 0.0) for layer in kinds])
    text = generated(plain, ids, sedac_mode="plain", **values).sequences
    risks = plain(text, exits="simulate").risks[:, ids.shape[1] :]
    # Off the observed risks themselves, so that rounding decides nothing.
    for share in (0.35, 0.5, 0.65, 0.2, 0.8, 0.9, 0.1, 0.42, 0.58):
        rules = [
            rule(layer, 2.01 * float(risks[..., k].quantile(share)), temperature=temperature)
            for k, layer in enumerate(kinds)
        ]
        model = wrap(base, kinds, rules)
        output = generated(model, ids, **values)
        if len(set(output.exit_layers[:, 1:].flatten().tolist())) > 1:
            return model, output
    raise AssertionError("no threshold parts the tokens of this model")
