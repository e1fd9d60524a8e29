"""Training of probes, and how well a gate tells safe exits from harmful ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from sedac_hf.calibration.documents import batches_of
from sedac_hf.calibration.measurement import collect_traces, predicting
from sedac_hf.calibration.states import BaseStates
from sedac_hf.calibration.traces import Traces
from sedac_hf.core.probe_inference import LREProbe, ProbeManager

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.floating[Any]]
_HUBER_BETA = 0.5
_STEPS, _BATCH, _RATE = 600, 512, 3e-3


@dataclass(frozen=True)
class GateReport:
    """How well one gate works at one checkpoint, on documents it was not trained on.

    Attributes:
        layer_idx: The checkpoint.
        gate: `"entropy"` or `"divergence"` (probes by target), `"probability"` (the exit's own), or
            what they are fused to: `"static risk"` and `"gated risk"` before the exit head,
            `"static"` and `"gated"` behind it.
        auroc: Chance that an exit that disagrees with full depth is ranked above one that agrees.
        share: Share of tokens that may leave, safest first, until the mean divergence over all
            tokens reaches the budget.
    """

    layer_idx: int
    gate: str
    auroc: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def auroc(score: FloatArray, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the receiver operating characteristic, ties counted half.

    Args:
        score: Higher means more likely positive, ``[n]``.
        positive: Labels, ``[n]``.

    Returns:
        The area; NaN when only one class is present.
    """
    hits, misses = int(positive.sum()), int((~positive).sum())
    if not hits or not misses:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def share_at_budget(score: FloatArray, divergence: FloatArray, budget: float) -> float:
    """Share of tokens that may leave, lowest score first, within a budget of mean divergence.

    Args:
        score: Risk, ``[n]``.
        divergence: KL divergence of each exit, nats, ``[n]``.
        budget: Mean divergence allowed over all tokens, nats.

    Returns:
        The share, in [0, 1].
    """
    if not len(score):
        return 0.0
    spent = np.cumsum(divergence[np.argsort(score, kind="stable")], dtype=np.float64)
    return float(np.mean(spent <= budget * len(score)))


def gate_report(
    layer_idx: int, gate: str, risk: FloatArray, traces: Traces, column: int, budget: float
) -> GateReport:
    """Judge a gate on traces; `risk` has one value for each row of the traces."""
    use = traces.eligible
    return GateReport(
        layer_idx,
        gate,
        auroc(risk[use], ~traces.agree[use, column]),
        share_at_budget(risk[use], traces.divergence[use, column], budget),
    )


def probe_inputs(head: ExitHead, states: BaseStates, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """States and full-depth entropies of the continuation tokens of some documents.

    Args:
        head: The head whose checkpoint is meant.
        states: Recorded states.
        rows: Documents, taken in the order of traces of the same rows.

    Returns:
        States ``[tokens, width]`` and entropies ``[tokens]``, nats.
    """
    inputs, entropies = [], []
    for chosen in batches_of(states.documents, rows, 4096):
        batch = states.batch(chosen, head.layer_idx)
        counted = predicting(batch)
        inputs.append(batch.states[counted])
        entropies.append(batch.entropy[counted])
    return torch.cat(inputs), torch.cat(entropies)


@dataclass(frozen=True)
class FittedProbes:
    """Probes of all checkpoints and how their gates compare.

    Attributes:
        probes: The probes of the better target.
        target: `"entropy"` or `"divergence"`.
        gates: Reports of all gates at all checkpoints.
        traces: Traces of the documents that the gates were judged on.
        seen: Traces of the documents that the probes were trained on.
    """

    probes: ProbeManager
    target: str
    gates: list[GateReport]
    traces: Traces
    seen: Traces


def fit_probes(
    heads: Sequence[ExitHead],
    shell: BaseShell,
    states: BaseStates,
    train: Sequence[int],
    judge: Sequence[int],
    draft: Tensor,
    *,
    rank: int,
    epsilon: float,
    temperatures: Sequence[float] | None = None,
    seed: int = 0,
) -> FittedProbes:
    """Train probes on both targets and keep those that let more tokens leave.

    Args:
        heads: Exit heads in the order of their checkpoints.
        shell: Shell of the base.
        states: Recorded states.
        train: Documents to train on; heads have not seen them.
        judge: Documents to compare gates on.
        draft: Draft vocabulary, token ids.
        rank: Rank of the probes.
        epsilon: Perplexity increase aimed at, as a fraction.
        temperatures: What each exit's logits are divided by; None means 1.
        seed: Seed of initialisation and batches.

    Returns:
        The better probes and what was measured.
    """
    device, budget = shell.base.device, float(np.log1p(epsilon))
    blank = ProbeManager.build(len(heads), states.width, 1).to(device)
    seen = collect_traces(heads, blank, shell, states, train, draft, temperatures)
    fresh = collect_traces(heads, blank, shell, states, judge, draft, temperatures)
    fitted: dict[str, list[LREProbe]] = {"entropy": [], "divergence": []}
    risks: dict[str, list[FloatArray]] = {"entropy": [], "divergence": []}
    own_risks: dict[str, list[FloatArray]] = {"entropy": [], "divergence": []}
    gates: list[GateReport] = []
    for column, head in enumerate(heads):
        inputs, entropy = probe_inputs(head, states, train)
        unseen, _ = probe_inputs(head, states, judge)
        targets = {"entropy": entropy, "divergence": torch.from_numpy(seen.divergence[:, column])}
        for name, target in targets.items():
            probe = train_probe(inputs, target, rank, seed=seed)
            risk: FloatArray = probe(unseen).numpy()
            fitted[name].append(probe)
            risks[name].append(risk)
            own_risks[name].append(probe(inputs).numpy())
            gates.append(gate_report(head.layer_idx, name, risk, fresh, column, budget))
        own = 1.0 - fresh.probability[:, column]
        gates.append(gate_report(head.layer_idx, "probability", own, fresh, column, budget))
    shares = {
        name: float(np.mean([gate.share for gate in gates if gate.gate == name])) for name in fitted
    }
    better = max(shares, key=lambda name: shares[name])
    logger.info("probes trained on %s let more tokens leave: %s", better, shares)
    traces, own_traces = (
        replace(traces, risk=np.stack(found[better], axis=1).astype(np.float32))
        for traces, found in ((fresh, risks), (seen, own_risks))
    )
    probes = ProbeManager(fitted[better]).to(device)
    return FittedProbes(probes, better, gates, traces, own_traces)


def train_probe(inputs: Tensor, target: Tensor, rank: int, *, seed: int = 0) -> LREProbe:
    """Fit one probe by Huber regression (beta 0.5) on ``log(1 + target)``.

    The regression target is clamped at its 1st and 99th percentile.

    Args:
        inputs: States, ``[tokens, width]``.
        target: Entropy or divergence, nats, ``[tokens]``.
        rank: Rank of the probe.
        seed: Seed of initialisation and batches.

    Returns:
        The probe, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.log1p(target.float().clamp_min(0))
    low, high = torch.quantile(wanted[:1_000_000], torch.tensor([0.01, 0.99]))
    wanted = wanted.clamp(low, high)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = LREProbe(inputs.shape[-1], rank)
    # The projection sees states of any size: start it at their scale, so that steps fit.
    with torch.no_grad():
        probe.project.weight /= inputs[:4096].float().square().mean().sqrt().clamp_min(1e-6)
        start = float(torch.expm1(wanted.mean().clamp_min(1e-3)).log())
        probe.out.bias.fill_(start)
    optimiser = torch.optim.AdamW(probe.parameters(), _RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        some = torch.randint(len(inputs), (min(_BATCH, len(inputs)),), generator=generator)
        loss = nn.functional.smooth_l1_loss(probe(inputs[some]), wanted[some], beta=_HUBER_BETA)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return probe.requires_grad_(False).eval()
