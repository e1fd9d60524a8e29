"""A tiny random model with exits that about half of the tokens take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sedac_hf.calibration.documents import Document
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import VOCABULARY, build_tiny

LAYERS = (0, 2)


def random_documents(count: int, *, seed: int = 0, low: int = 7, high: int = 14) -> list[Document]:
    """Random documents with prompts of 3 tokens, without special tokens."""
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(3, VOCABULARY, rng.integers(low, high)), prompt_length=3)
        for _ in range(count)
    ]


def wrapped_llama(head: str = "block", *, share: float = 0.4, gate: float = 0.0):
    """A wrapped Llama, thresholds at a quantile of its own risks; a share of 0 closes all."""
    base = build_tiny("llama")
    specs = [CheckpointSpec(layer_idx=layer, head=head, lens_rank=4) for layer in LAYERS]
    rule = LayerConfig(0, threshold=0.0, decay=0.0, exit_confidence=2.0, min_probability=gate)
    closed = CascadeConfig([replace(rule, layer_idx=layer) for layer in LAYERS])
    torch.manual_seed(1)
    model = SedacForCausalLM.from_base(base, specs, closed, probe_rank=8)
    for parameter in model.exit_heads.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.randint(3, VOCABULARY, (8, 12))
    risks = model(input_ids=ids, use_cache=False, exits="simulate").risks.flatten(0, 1).numpy()
    levels = 2.0 * np.quantile(risks, share, axis=0) * (share > 0)
    rules = [
        replace(rule, layer_idx=layer, threshold=float(np.float32(level)), exit_confidence=0.5)
        for layer, level in zip(LAYERS, levels, strict=True)
    ]
    model.set_cascade(CascadeConfig(rules))
    return model
