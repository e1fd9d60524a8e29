"""A model whose losses can be worked out by hand: it stands in for the wrapper in scoring."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.policy_search import Policy
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig

VOCABULARY = 24
LAYERS = 6
CHECKPOINT = 2


class FakeModel:
    """Logits from a table; a token that leaves early is off by the threshold in force.

    A position leaves when its token is a multiple of 3. Its logits then lose `threshold` at the
    token of highest logit, and each later position of the row loses a tenth of that more for every
    exit before it, as stale K/V would do.
    """

    def __init__(self, threshold: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.threshold = threshold
        self.cascade = policy(threshold).cascade
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.poison: dict[str, int] = {}
        self.forwards: list[tuple[str, tuple[int, ...]]] = []
        spec = CheckpointSpec(layer_idx=CHECKPOINT)
        text_config = SimpleNamespace(num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
        self.config = SimpleNamespace(
            get_text_config=lambda: text_config,
            checkpoint_specs=lambda: [spec],
            kv_mode="propagate",
            fingerprint={"shape": "ab", "weights": "cd"},
        )

    @contextmanager
    def cascade_replaced(self, cascade):
        before = self.threshold
        if cascade is not None:
            self.threshold = cascade.layers[0].threshold
        try:
            yield
        finally:
            self.threshold = before

    def __call__(self, *, input_ids, attention_mask, use_cache, exits, exit_start):
        assert not use_cache
        self.forwards.append((exits, tuple(input_ids.shape)))
        logits = self.table[input_ids].clone()
        layers = torch.full(input_ids.shape, LAYERS)
        if exits == "simulate":
            position = torch.arange(input_ids.shape[1])[None]
            left = (position >= exit_start[:, None]) & (input_ids % 3 == 0) & (attention_mask > 0)
            layers[left] = CHECKPOINT
            before = left.long().cumsum(1) - left.long()
            loss = self.threshold * (left + 0.1 * before)
            best = logits.argmax(-1, keepdim=True)
            logits.scatter_add_(-1, best, -loss[..., None].to(logits.dtype))
        for when, token in self.poison.items():
            if when in ("always", exits):
                logits[input_ids == token] = float("nan")
        return SimpleNamespace(logits=logits, exit_layers=layers)


def documents(count: int, *, seed: int = 0, low: int = 6, high: int = 20) -> list[Document]:
    """Random documents with prompts of 3 tokens."""
    rng = np.random.default_rng(seed)
    return [
        Document(rng.integers(VOCABULARY, size=rng.integers(low, high)), prompt_length=3)
        for _ in range(count)
    ]


def policy(threshold: float) -> Policy:
    """A policy that is off by `threshold`, which is also how bold it is."""
    cascade = CascadeConfig((LayerConfig(layer_idx=CHECKPOINT, threshold=threshold),))
    return Policy(cascade, threshold, 0.3, 1.0 - threshold)


def slow_scores(model: FakeModel, document: Document, threshold: float | None):
    """NLL sum, scored tokens, decode steps and exits, position by position."""
    ids = document.ids.tolist()
    start = max(1, document.prompt_length)
    nll, steps, left = 0.0, 0, 0
    for position in range(len(ids) - 1):
        logits = model.table[ids[position]].double().clone()
        if threshold is not None and position >= start:
            out = ids[position] % 3 == 0
            logits[int(logits.argmax())] -= threshold * (out + 0.1 * left)
            left += out
        if position >= start - 1:
            nll -= float(torch.log_softmax(logits, -1)[ids[position + 1]])
        steps += position >= start
    return nll, len(ids) - start, steps, left
