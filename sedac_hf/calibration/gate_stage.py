"""The stage of `fit` that learns what gates may be made of: fusion, and classes of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from sedac_hf.calibration.fusion_training import Evidence, FittedGate, ModalityReport, fit_gate
from sedac_hf.calibration.probe_training import GateReport, probe_inputs
from sedac_hf.calibration.token_facts import TokenFacts
from sedac_hf.core.cascade_controller import CascadeConfig, CascadeController, LayerConfig
from sedac_hf.core.confidence_fusion import EnhancedConfidenceAccumulator, GatedFusion
from sedac_hf.core.estimators import (
    EntropyProbeEstimator,
    Observation,
    TokenConsistencyEstimator,
)
from sedac_hf.core.fused_gates import CheckpointFusion, FusedGates, Seen
from sedac_hf.core.probe_inference import LREProbe
from sedac_hf.core.row_history import entropy_of

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.states import BaseStates
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.core.exit_heads import ExitHead
    from sedac_hf.core.probe_inference import ProbeManager

__all__ = ["FittedFusion", "TracedSplit", "entropy_price", "fit_fusion", "fused_traces"]

FloatArray = npt.NDArray[np.float32]
# Calls by which the time of a modality is taken.
_TIMED_CALLS = 100
# Tokens that are fused at a time.
_CHUNK = 4096


@dataclass(frozen=True)
class TracedSplit:
    """A split of documents with all that is known of its tokens.

    Attributes:
        rows: Its documents.
        traces: Their traces, with the probes' risks.
        facts: What else is known of the same tokens.
    """

    rows: Sequence[int]
    traces: Traces
    facts: TokenFacts


@dataclass(frozen=True)
class FittedFusion:
    """Fusion of all checkpoints and how it was chosen.

    Attributes:
        fusion: Weights of each checkpoint; None where no modality beside the usual ones earns any.
        pays: Whether a modality in it is worth its time; if none is, the weights are those of all
            evidence, for whoever wants to see what it would do.
        gates: How the fused gates compare with those alone.
        modalities: What each modality adds, and what it costs.
        extra: What fusing costs per token that is asked at each checkpoint, as a fraction of a full
            pass, by kind: `"static"` and `"gated"`.
    """

    fusion: tuple[CheckpointFusion, ...] | None
    pays: bool
    gates: list[GateReport]
    modalities: list[ModalityReport]
    extra: dict[str, list[float]]


def fit_fusion(
    heads: Sequence[ExitHead],
    probes: ProbeManager,
    states: BaseStates,
    seen: TracedSplit,
    fresh: TracedSplit,
    costs: CostModel,
    *,
    epsilon: float,
    attention: Sequence[float] | None = None,
    seed: int = 0,
) -> FittedFusion:
    """Learn both gates of every checkpoint.

    Args:
        heads: Exit heads in the order of their checkpoints.
        probes: Their probes.
        states: Recorded states.
        seen: Documents to learn on; the probes' own.
        fresh: Documents to judge on.
        costs: What probes, tries and exits cost.
        epsilon: Perplexity increase aimed at, as a fraction.
        attention: What it costs to see how evenly the layer of each checkpoint attends, as a
            fraction of a full pass; None leaves that evidence out.
        seed: Seed of the networks.

    Returns:
        The fusion.
    """
    budget = float(np.log1p(epsilon))
    kept: list[CheckpointFusion] = []
    offered: list[CheckpointFusion] = []
    prices: list[_Prices] = []
    gates: list[GateReport] = []
    modalities: list[ModalityReport] = []
    for k, head in enumerate(heads):
        probe = LREProbe(*_sizes(probes, k))
        probe.load_state_dict({n: v.cpu() for n, v in probes.probes[k].state_dict().items()})
        probe.requires_grad_(False)
        price = _prices(probe, costs.checkpoints[k].probe, costs.source)
        evidence = [_evidence(k, head, probe, states, split) for split in (seen, fresh)]
        if attention is None or not all(e.finite(["attention"]).any() for e in evidence):
            evidence = [e.without("attention") for e in evidence]
        else:
            price = replace(price, attention=attention[k])
        saved = max(costs.checkpoints[k].saved - costs.checkpoints[k].attempt, 0.0)
        fitted = _fit_checkpoint(head.layer_idx, evidence, budget, saved, price, seed)
        risk, sureness = fitted["risk"], fitted["sureness"]
        kept.append(CheckpointFusion(risk.weights, sureness.weights))
        offered.append(CheckpointFusion(risk.offered, sureness.offered))
        prices.append(price)
        for name, gate in fitted.items():
            modalities += gate.reports
            end = " risk" if name == "risk" else ""
            gates += [
                GateReport(head.layer_idx, kind + end, gate.auroc[kind], share)
                for kind, share in gate.share.items()
                if kind != "base"
            ]
    pays = not _is_plain(kept)
    found = tuple(kept if pays else offered)
    extra = {
        kind: [price.of(each, kind) for price, each in zip(prices, found, strict=True)]
        for kind in ("static", "gated")
    }
    return FittedFusion(None if _is_plain(found) else found, pays, gates, modalities, extra)


def _is_plain(found: Sequence[CheckpointFusion]) -> bool:
    """Whether all gates go by what they would go by without fusion."""
    return all(f.risk.kept == ("entropy",) and f.sureness.kept == ("perplexity",) for f in found)


def _fit_checkpoint(
    layer_idx: int,
    evidence: Sequence[Evidence],
    budget: float,
    saved: float,
    price: _Prices,
    seed: int,
) -> dict[str, FittedGate]:
    """Both gates of one checkpoint, by name; the first does not know the exit's probability."""
    before = [e.without("perplexity") for e in evidence]
    settings = {"budget": budget, "saved": saved, "costs": price.by_modality(), "seed": seed}
    return {
        gate: fit_gate(layer_idx, gate, base, *given, **settings)  # type: ignore[arg-type]
        for gate, base, given in (
            ("risk", "entropy", before), ("sureness", "perplexity", evidence),
        )
    }  # fmt: skip


def fused_traces(
    fusion: Sequence[CheckpointFusion],
    kind: str,
    heads: Sequence[ExitHead],
    probes: ProbeManager,
    states: BaseStates,
    split: TracedSplit,
) -> Traces:
    """Traces with the fused risk and sureness in place of the probe's and the exit's own.

    Args:
        fusion: Weights of each checkpoint.
        kind: `"static"` or `"gated"`.
        heads: Exit heads in the order of their checkpoints.
        probes: Their probes.
        states: Recorded states.
        split: The documents.

    Returns:
        The same traces but for `risk` and `probability`.
    """
    gates = FusedGates(fusion, kind, probes)
    risk, sureness = (np.empty_like(split.traces.risk) for _ in range(2))
    for k, head in enumerate(heads):
        inputs, _ = probe_inputs(head, states, split.rows)
        device = next(probes.probes[k].parameters()).device
        for start in range(0, len(inputs), _CHUNK):
            part = slice(start, start + _CHUNK)
            shown = Seen(Observation(inputs[part].to(device)))
            shown.risks = {
                "entropy": torch.from_numpy(split.traces.risk[part, k]),
                "consistency": torch.from_numpy(split.facts.consistency[part, k]),
                "attention": torch.from_numpy(split.facts.attention[part, k]),
            }
            risk[part, k] = gates.risk(k, shown)
            own = np.ascontiguousarray(split.traces.probability[part, k])
            sureness[part, k] = gates.sureness(k, shown, own)
    return replace(split.traces, risk=risk, probability=sureness)


def _evidence(
    k: int, head: ExitHead, probe: LREProbe, states: BaseStates, split: TracedSplit
) -> Evidence:
    """What the gates of a checkpoint can go by; tokens that may not leave are left out."""
    traces, use = split.traces, split.traces.eligible
    inputs, _ = probe_inputs(head, states, split.rows)
    with torch.no_grad():
        features = torch.cat([probe.features(part) for part in torch.split(inputs, _CHUNK)])
    with np.errstate(divide="ignore"):
        surprise = -np.log(traces.probability[use, k])
    return Evidence(
        {
            "entropy": traces.risk[use, k],
            "consistency": split.facts.consistency[use, k],
            "attention": split.facts.attention[use, k],
            "perplexity": surprise,
        },
        traces.divergence[use, k],
        traces.agree[use, k],
        features[torch.from_numpy(use)],
    )


@dataclass(frozen=True)
class _Prices:
    """What is paid per token beside the probe, each a fraction of a full pass.

    Attributes:
        turn: Working out how far a state has turned.
        fusing: Putting the risks of one gate together.
        network: Weights that differ by token, for one gate.
        attention: Seeing how evenly the checkpoint's layer attends.
    """

    turn: float
    fusing: float
    network: float
    attention: float = 0.0

    def by_modality(self) -> dict[str, float]:
        """What taking a modality into a gate costs at most; the usual ones are there anyway."""
        return {
            "entropy": self.fusing,
            "perplexity": self.fusing,
            "consistency": self.turn + self.fusing,
            "attention": self.attention + self.fusing,
            "network": self.network,
        }

    def of(self, fusion: CheckpointFusion, kind: str) -> float:
        """What fusing costs at one checkpoint."""
        both = (fusion.risk, fusion.sureness)
        gates = [gate for gate in both if len(gate.kept) > 1]
        cost = self.fusing * len(gates)
        cost += self.turn * any("consistency" in gate.kept for gate in both)
        cost += self.attention * any("attention" in gate.kept for gate in both)
        return cost + self.network * len(gates) * (kind == "gated")


def _prices(probe: LREProbe, share: float, source: str) -> _Prices:
    """Prices from the probe's own cost: by time beside it if measured, else by numbers read."""
    width, rank = probe.project.in_features, probe.project.out_features
    if source != "measured":
        # A turn reads two states; a network little more than the probe, and its few own weights.
        return _Prices(share * 2.0 / rank, 0.0, share * (1.0 + 16.0 / width))
    states = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    seen, turn = Observation(states, states), TokenConsistencyEstimator()
    plain = CascadeController(CascadeConfig([LayerConfig(0, 1.0)]), [probe.packed()])
    gated, wide = GatedFusion(rank, 2).double(), LREProbe(width, rank).double()
    fused = EnhancedConfidenceAccumulator(width)
    for each in (EntropyProbeEstimator(probe), turn):
        fused.add_estimator(each)
    fixed = torch.ones(2, dtype=torch.float64)
    risk = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        own, turned, fusing, network = (
            _seconds(call)
            for call in (
                lambda: plain.risks(0, states),
                lambda: turn.risk(seen),
                lambda: fused.risk_of([risk, risk], states),
                lambda: gated(wide.features(states), fixed),
            )
        )
    scale = share / max(own, 1e-9)
    return _Prices(turned * scale, fusing * scale, network * scale)


def entropy_price(probes: ProbeManager, vocabulary: int, costs: CostModel) -> float:
    """What the entropy of one token's full depth costs, as a fraction of a full pass.

    Args:
        probes: The probes, by whose own cost time is turned into a fraction.
        vocabulary: Words of the base.
        costs: What probes, tries and exits cost.
    """
    width, rank = _sizes(probes, 0)
    if costs.source != "measured":
        # Its logits are read twice, as float32; the head reads as many rows of weights.
        return 4.0 * costs.head / width
    states = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    probe = LREProbe(width, rank).requires_grad_(False)
    plain = CascadeController(CascadeConfig([LayerConfig(0, 1.0)]), [probe.packed()])
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    own, spent = _seconds(lambda: plain.risks(0, states)), _seconds(lambda: entropy_of(logits))
    return costs.checkpoints[0].probe * spent / max(own, 1e-9)


def _seconds(call: Callable[[], object]) -> float:
    """CPU time of one call, the median of some runs of many."""
    found = []
    for _ in range(5):
        begun = time.process_time()
        for _ in range(_TIMED_CALLS):
            call()
        found.append((time.process_time() - begun) / _TIMED_CALLS)
    return float(np.median(found))


def _sizes(probes: ProbeManager, k: int) -> tuple[int, int]:
    project = probes.probes[k].project
    return int(project.in_features), int(project.out_features)  # type: ignore[union-attr, arg-type]
