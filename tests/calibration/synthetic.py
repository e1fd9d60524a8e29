"""Traces of an invented model whose true losses are known, since the population is finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sedac_hf.calibration.costs import CheckpointCost, CostModel

CHECKPOINTS = (3, 6)
TOKENS = 16


@dataclass
class SyntheticTraces:
    """The part of Traces that the policy search reads."""

    checkpoints: tuple[int, ...]
    doc_offsets: np.ndarray
    eligible: np.ndarray
    nll_full: np.ndarray
    risk: np.ndarray
    probability: np.ndarray
    delta_nll: np.ndarray


def population(documents: int = 2000, *, seed: int = 0) -> SyntheticTraces:
    """Documents of 16 tokens; hard documents have more hard tokens, on which exits cost a lot."""
    rng = np.random.default_rng(seed)
    difficulty = rng.beta(2.0, 4.0, (documents, 1))
    hard = rng.random((documents, TOKENS)) < difficulty
    risk, probability, delta = (np.empty((documents, TOKENS, 2), np.float32) for _ in range(3))
    for k, noise in enumerate((0.45, 0.3)):
        signal = hard + rng.normal(0.0, noise, hard.shape)
        risk[..., k] = np.logaddexp(0.0, 2.0 * signal)
        probability[..., k] = 1.0 / (1.0 + np.exp(4.0 * (signal - 0.4 + rng.normal(0, 0.2))))
        easy_loss = rng.normal(0.002, 0.05, hard.shape)
        hard_loss = rng.exponential(0.9 if k == 0 else 0.6, hard.shape)
        delta[..., k] = np.where(hard, hard_loss, easy_loss)
    flat = documents * TOKENS
    eligible = np.ones((documents, TOKENS), bool)
    eligible[:, 0] = False
    return SyntheticTraces(
        CHECKPOINTS,
        np.arange(0, flat + 1, TOKENS, dtype=np.int64),
        eligible.reshape(flat),
        np.full(flat, 2.0, np.float32),
        risk.reshape(flat, 2),
        probability.reshape(flat, 2),
        delta.reshape(flat, 2),
    )


def drawn(whole: SyntheticTraces, index: np.ndarray) -> SyntheticTraces:
    """The documents at `index`."""

    def rows(values: np.ndarray) -> np.ndarray:
        shaped = values.reshape(-1, TOKENS, *values.shape[1:])
        return np.ascontiguousarray(shaped[index].reshape(-1, *values.shape[1:]))

    return SyntheticTraces(
        whole.checkpoints,
        np.arange(0, len(index) * TOKENS + 1, TOKENS, dtype=np.int64),
        *(
            rows(getattr(whole, name))
            for name in ("eligible", "nll_full", "risk", "probability", "delta_nll")
        ),
    )


def cost_model() -> CostModel:
    """Ten layers; the first exit saves more."""
    return CostModel(
        tuple(
            CheckpointCost(layer, probe=0.002, fill=0.004, attempt=0.08, gate=0.03, saved=saved)
            for layer, saved in zip(CHECKPOINTS, (0.5, 0.27), strict=True)
        ),
        head=0.1,
        depth=10,
    )
