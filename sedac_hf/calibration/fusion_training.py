"""Fusion weights, learned on traces against the exits' true divergence; what does not pay goes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from sedac_hf.calibration.probe_training import auroc, share_at_budget
from sedac_hf.core.confidence_fusion import GatedFusion
from sedac_hf.core.fused_gates import MODALITIES, GateWeights

__all__ = [
    "Evidence",
    "FittedGate",
    "ModalityReport",
    "fit_gate",
    "static_weights",
    "train_network",
]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
_STEPS, _BATCH, _RATE = 400, 512, 3e-3
_HUBER_BETA = 0.5
# Tokens of greater divergence count like those at this quantile: they leave under no policy.
_CLAMP = 0.99


@dataclass(frozen=True)
class Evidence:
    """What one gate of one checkpoint can go by, for T tokens.

    Attributes:
        risks: Risk by modality, ``[T]`` each; names of `MODALITIES`.
        divergence: KL divergence of the exit from full depth, nats, ``[T]``.
        agree: Whether both have the same first choice, ``[T]``.
        features: What the probe sees of the states, ``[T, rank]``; only a network looks at it.
    """

    risks: Mapping[str, FloatArray]
    divergence: FloatArray
    agree: BoolArray
    features: Tensor

    def without(self, modality: str) -> Evidence:
        """The same where one modality is not known."""
        return replace(self, risks={n: r for n, r in self.risks.items() if n != modality})

    def finite(self, names: Sequence[str]) -> BoolArray:
        """Tokens of which everything is known that some modalities say."""
        known: BoolArray = np.isfinite(self.divergence)
        for name in names:
            known = known & np.isfinite(self.risks[name])
        return known


@dataclass(frozen=True)
class ModalityReport:
    """What one modality adds to one gate, and what it costs.

    Attributes:
        layer_idx: The checkpoint.
        gate: `"risk"` before the exit head, `"sureness"` behind it.
        modality: Its name; `"network"` for weights that differ by token.
        auroc_gain: AUROC with it less that without.
        share_gain: Share of tokens that may leave at the budget with it, less that without.
        worth: What this saves, as a fraction of a full pass per token.
        cost: What working it out costs, likewise.
        kept: Whether it is worth more than it costs.
    """

    layer_idx: int
    gate: str
    modality: str
    auroc_gain: float
    share_gain: float
    worth: float
    cost: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class FittedGate:
    """A gate and how it was chosen.

    Attributes:
        weights: Its weights; the network is there for the gated kind alone.
        offered: The weights of all evidence, whether it pays or not.
        reports: What each modality adds.
        share: Share of tokens that may leave at the budget: of the base modality alone, static and
            gated.
        auroc: The same for the AUROC.
    """

    weights: GateWeights
    offered: GateWeights
    reports: list[ModalityReport]
    share: dict[str, float]
    auroc: dict[str, float]


def fit_gate(
    layer_idx: int,
    gate: str,
    base: str,
    seen: Evidence,
    fresh: Evidence,
    *,
    budget: float,
    saved: float,
    costs: Mapping[str, float],
    seed: int = 0,
) -> FittedGate:
    """Learn a gate on some tokens, and judge on others what of it pays.

    Modalities are taken out one by one, the least useful first, for as long as one costs more than
    the exits it adds save. The base modality stays.

    Args:
        layer_idx: The checkpoint, for the report.
        gate: `"risk"` or `"sureness"`, for the report.
        base: The modality that the gate goes by without fusion.
        seen: Tokens to learn on.
        fresh: Tokens to judge on.
        budget: Mean divergence allowed over all tokens, nats.
        saved: What an exit saves, as a fraction of a full pass.
        costs: What each modality costs per token, likewise; `"network"` for a gating network.
        seed: Seed of the network.

    Returns:
        The gate. A gate that goes by its base alone is as good as none.
    """
    names = [name for name in MODALITIES if name in seen.risks]
    scales = _scales(seen)
    every = static_weights(seen, names, base)
    dropped: dict[str, ModalityReport] = {}
    while True:
        whole = _judged(static_weights(seen, names, base), fresh, scales, budget)
        reports = {}
        for name in names:
            if name == base:
                continue
            rest = [other for other in names if other != name]
            less = _judged(static_weights(seen, rest, base), fresh, scales, budget)
            worth = (whole[0] - less[0]) * saved
            kept = worth > costs[name]
            reports[name] = ModalityReport(
                layer_idx, gate, name, whole[1] - less[1], whole[0] - less[0], worth,
                costs[name], kept,
            )  # fmt: skip
        losing = [name for name in reports if not reports[name].kept]
        if not losing:
            break
        worst = min(losing, key=lambda name: reports[name].worth - costs[name])
        dropped[worst] = reports[worst]
        names.remove(worst)
    static = static_weights(seen, names, base)
    alone = _judged(static_weights(seen, [base], base), fresh, scales, budget)
    share = {"base": alone[0], "static": whole[0]}
    area = {"base": alone[1], "static": whole[1]}
    found = [*dropped.values(), *reports.values()]
    network = None
    if (static > 0).sum() > 1:
        network = train_network(seen, static, scales, seed=seed)
        gated = _judged(static, fresh, scales, budget, network)
        share["gated"], area["gated"] = gated
        worth = (gated[0] - whole[0]) * saved
        kept = worth > costs["network"]
        found.append(
            ModalityReport(
                layer_idx, gate, "network", gated[1] - whole[1], gated[0] - whole[0], worth,
                costs["network"], kept,
            )
        )  # fmt: skip
    thresholds = np.array([scales.get(name, 1.0) for name in MODALITIES], np.float32)
    weights = offered = GateWeights(thresholds, static, network)
    if (every > 0).sum() > 1 and not np.array_equal(every, static):
        network = train_network(seen, every, scales, seed=seed)
        offered = GateWeights(thresholds, every, network)
    return FittedGate(weights, offered, found, share, area)


def static_weights(seen: Evidence, names: Sequence[str], base: str) -> FloatArray:
    """Weights that sum to 1, by least squares on ``ln(1 + divergence)`` with none below 0.

    Args:
        seen: Tokens to learn on.
        names: Modalities that may have weight.
        base: The one of them that has it all where none earns any.

    Returns:
        ``[modalities]``, for risks divided by their mean; 0 for those that are not named.
    """
    known, scales = seen.finite(names), _scales(seen)
    columns = [seen.risks[name][known] / scales[name] for name in names]
    target = _target(seen)[known]
    # A constant takes up what no modality explains; it changes no order and is left out after.
    table = np.stack([*columns, np.ones_like(target)], axis=1).astype(np.float64)
    found = np.zeros(len(names))
    if len(target) > len(names):
        # The normal equations have as many rows as modalities, however many tokens there are.
        gram, moment = table.T @ table, table.T @ target
        factor = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))
        found = nnls(factor.T, np.linalg.solve(factor, moment))[0][:-1]
    if not found.sum() > 0:
        found[list(names).index(base)] = 1.0
    weights = np.zeros(len(MODALITIES), np.float32)
    for name, weight in zip(names, found / found.sum(), strict=True):
        # What hardly counts is not worth working out.
        weights[MODALITIES.index(name)] = weight if weight > 1e-3 else 0.0
    return weights


def train_network(
    seen: Evidence, weights: FloatArray, scales: Mapping[str, float], *, seed: int = 0
) -> GatedFusion:
    """Teach a network to weigh modalities by token, from the fixed weights on.

    Args:
        seen: Tokens to learn on.
        weights: Fixed weights, ``[modalities]``; those of 0 stay out.
        scales: What each modality's risk is divided by.
        seed: Seed of initialisation and batches.

    Returns:
        The network over the modalities that have weight, in their order.
    """
    names = [name for at, name in enumerate(MODALITIES) if weights[at] > 0]
    known = np.flatnonzero(seen.finite(names))
    columns = [seen.risks[name][known] / scales[name] for name in names]
    risks = torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))
    target = torch.from_numpy(_target(seen)[known].astype(np.float32))
    features = seen.features[torch.from_numpy(known)]
    fixed = torch.from_numpy(weights[weights > 0])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = GatedFusion(features.shape[-1], len(names))
    # How risk becomes divergence is learned beside the weights; the order does not need it.
    line = nn.Parameter(torch.tensor([float(target.mean()), 0.0]))
    optimiser = torch.optim.AdamW([*network.parameters(), line], _RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        some = torch.randint(len(risks), (min(_BATCH, len(risks)),), generator=generator)
        fused = (risks[some] * network(features[some], fixed)).sum(-1)
        loss = nn.functional.smooth_l1_loss(
            line[0] * fused + line[1], target[some], beta=_HUBER_BETA
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return network.requires_grad_(False).eval()


def _judged(
    weights: FloatArray,
    fresh: Evidence,
    scales: Mapping[str, float],
    budget: float,
    network: GatedFusion | None = None,
) -> tuple[float, float]:
    """Share at the budget and AUROC of a fused risk."""
    names = [name for at, name in enumerate(MODALITIES) if weights[at] > 0]
    table = np.stack([fresh.risks[name] / scales[name] for name in names], axis=1)
    if network is None:
        fused = table @ weights[weights > 0]
    else:
        with torch.no_grad():
            shares = network(fresh.features, torch.from_numpy(weights[weights > 0]))
        fused = (table * shares.numpy()).sum(axis=1)
    # What is not known never leaves.
    fused = np.where(np.isfinite(fused), fused, np.inf)
    share = share_at_budget(fused, fresh.divergence, budget)
    return share, auroc(fused, ~fresh.agree)


def _scales(seen: Evidence) -> dict[str, float]:
    """Mean risk of each modality, so that weights say what counts; 1 for one that is all 0."""
    means = {}
    for name, risk in seen.risks.items():
        finite = risk[np.isfinite(risk)]
        means[name] = float(finite.mean(dtype=np.float64)) if len(finite) else 0.0
    return {name: float(np.float32(mean)) if mean > 1e-6 else 1.0 for name, mean in means.items()}


def _target(seen: Evidence) -> npt.NDArray[np.float64]:
    wanted = np.log1p(np.maximum(seen.divergence.astype(np.float64), 0.0))
    finite = wanted[np.isfinite(wanted)]
    return np.minimum(wanted, np.quantile(finite, _CLAMP)) if len(finite) else wanted
