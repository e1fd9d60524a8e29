"""Wrapped models whose rules use fusion, routing and an adaptive decay, alone or together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.core.cascade_options import AdaptiveDecay, ClassRule
from sedac_hf.core.confidence_fusion import GatedFusion
from sedac_hf.core.fused_gates import CheckpointFusion, GateWeights
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.token_routing import TOKEN_CLASSES
from sedac_hf.modeling import SedacForCausalLM
from tests.wrapping import rule, wrap

ROUTES = (
    ClassRule(1.0, 1.0),
    ClassRule(0.8, 0.5),
    ClassRule(1.5, 2.0),
    ClassRule(0.0, 1.0),
    ClassRule(1.2, 0.9),
)
PARTS: dict[str, dict[str, Any]] = {
    "static": {"fusion": "static"},
    "gated": {"fusion": "gated"},
    "decay": {"adaptive_decay": AdaptiveDecay(4.0, 0.25, 0.75)},
    "routes": {"routes": ROUTES},
    "all": {
        "fusion": "gated",
        "adaptive_decay": AdaptiveDecay(4.0, 0.25, 0.75),
        "routes": ROUTES,
    },
}


def network(features: int, estimators: int, seed: int) -> GatedFusion:
    """A gating network that does something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = GatedFusion(features, estimators, 4)
        torch.nn.init.normal_(found.out.weight)
    return found.requires_grad_(False).eval()


def parts_for(
    checkpoints: int, rank: int, vocabulary: int, *, attentive: bool = False
) -> GateParts:
    """Fusion of two kinds of evidence before the head and three behind it; classes by id.

    With `attentive` both also go by how evenly the checkpoint's layer attends.
    """
    thresholds = np.array([0.7, 0.4, 0.1 if attentive else 1.0, 2.0], np.float32)
    more = 1.0 if attentive else 0.0

    def gate(weights: list[float], seed: int) -> GateWeights:
        values = np.array(weights, np.float32)
        return GateWeights(thresholds, values, network(rank, int((values > 0).sum()), seed=seed))

    fusion = tuple(
        CheckpointFusion(gate([0.6, 0.4, more, 0], k), gate([0.2, 0.3, more, 0.5], 9 + k))
        for k in range(checkpoints)
    )
    table = (np.arange(vocabulary) % len(TOKEN_CLASSES)).astype(np.uint8)
    return GateParts(fusion, table)


def gated_model(
    base: PreTrainedModel,
    options: dict[str, Any],
    ids: Tensor,
    kinds: dict[int, str] | None = None,
    *,
    sure: float = 0.0,
    share: float = 0.5,
    attentive: bool = False,
    **values: Any,
) -> SedacForCausalLM:
    """A model whose checkpoints let some positions leave by rules with these options.

    Args:
        base: The base.
        options: Fields of `CascadeConfig`.
        ids: Texts whose risks the thresholds are set by.
        kinds: Layer -> kind of head.
        sure: Share of the tries that are not sure enough.
        share: Share of the positions that try at each checkpoint, about.
        attentive: Whether the gates go by the attention too.
        **values: Further fields of the configuration.
    """
    kinds = kinds or {0: "lens", 2: "lens"}
    model = wrap(base, kinds, [rule(layer, 0.0) for layer in kinds], probe_rank=8, **values)
    model.set_gates(parts_for(len(kinds), 8, base.config.vocab_size, attentive=attentive))
    fusion = options.get("fusion", "none")
    closed = CascadeConfig([rule(layer, 0.0) for layer in kinds], fusion=fusion)
    model.set_cascade(closed)
    risks = model(ids, use_cache=False, exits="simulate").risks.flatten(0, 1)
    layers = [
        LayerConfig(layer, 2.001 * float(risks[:, k].nanquantile(share)), decay=0.7)
        for k, layer in enumerate(kinds)
    ]
    model.set_cascade(CascadeConfig(layers, **options))
    if sure > 0:
        asking = [replace(layer, min_probability=1e-6) for layer in layers]
        model.set_cascade(CascadeConfig(asking, **{**options, "routes": ()}))
        found = model(ids, use_cache=False, exits="simulate").probabilities.flatten(0, 1)
        asking = [
            replace(layer, min_probability=float(found[:, k].nanquantile(sure)))
            for k, layer in enumerate(layers)
        ]
        model.set_cascade(CascadeConfig(asking, **options))
    return model
