"""Fusion in the running model: two gates at each checkpoint, both learned by `fit`.

The gate before the exit head (`risk`) decides who tries; it knows what the state says. The gate
behind it (`sureness`) decides who leaves; it also knows the exit's own probability. Their results
stand where the probe's risk and that probability stand without fusion, so the rules of the cascade
are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.confidence_fusion import EnhancedConfidenceAccumulator, GatedFusion
from sedac_hf.core.estimators import (
    AttentionEntropyEstimator,
    EntropyProbeEstimator,
    Estimator,
    Observation,
    PerplexityEstimator,
    TokenConsistencyEstimator,
)
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.probe_inference import LREProbe, ProbeManager

__all__ = [
    "FUSIONS",
    "MODALITIES",
    "CheckpointFusion",
    "FusedGates",
    "GateWeights",
    "Seen",
    "fusion_from_tensors",
    "fusion_tensors",
]

FloatArray = npt.NDArray[np.float32]
Probes = Sequence[Callable[[Tensor], Tensor]]

# Ways to fuse, in the order of their codes in an artefact.
FUSIONS: Final = ("none", "static", "gated")
# What is fused, in the order of the weights that are stored.
MODALITIES: Final = ("entropy", "consistency", "attention", "perplexity")
_GATES: Final = ("risk", "sureness")


@dataclass(frozen=True, eq=False)
class GateWeights:
    """How one gate fuses.

    Attributes:
        thresholds: What each modality's risk is divided by, above 0, `[modalities]`.
        weights: Fixed weights, at least 0 and at least one above it, `[modalities]`; 0 leaves a
            modality out, which is then not worked out.
        network: Weights each token's modalities, those left out excluded; None without one.
    """

    thresholds: FloatArray
    weights: FloatArray
    network: GatedFusion | None = None

    def __post_init__(self) -> None:
        """Refuse weights that nothing can be fused by.

        Raises:
            ConfigError: If a shape is another, or a value is not finite or out of range.
        """
        shape = (len(MODALITIES),)
        for name, least in (("thresholds", np.finfo(np.float32).tiny), ("weights", 0.0)):
            values = getattr(self, name)
            if values.shape != shape or not (np.isfinite(values).all() and (values >= least).all()):
                raise ConfigError(
                    f"fusion {name} must be {len(MODALITIES)} finite numbers, one for each of "
                    f"{MODALITIES}, thresholds above 0 and weights at least 0; found {values}."
                )
        if not (self.weights > 0).any():
            raise ConfigError(f"a gate needs a modality of {MODALITIES} with a weight above 0.")

    @property
    def kept(self) -> tuple[str, ...]:
        """Modalities that have weight."""
        return tuple(np.array(MODALITIES)[self.weights > 0].tolist())


@dataclass(frozen=True, eq=False)
class CheckpointFusion:
    """Both gates of one checkpoint.

    Attributes:
        risk: The gate before the exit head; the exit's own probability has no weight in it.
        sureness: The gate behind it.
    """

    risk: GateWeights
    sureness: GateWeights

    def __post_init__(self) -> None:
        """Refuse a first gate that needs what is only known behind the head.

        Raises:
            ConfigError: If the own probability has weight before the exit is asked.
        """
        if "perplexity" in self.risk.kept:
            raise ConfigError("the gate before the exit head cannot know the exit's probability.")


class Seen:
    """What one checkpoint has shown of some rows; each modality is worked out once."""

    def __init__(self, observation: Observation) -> None:
        """Nothing is worked out yet.

        Args:
            observation: States `[rows, width]` and what is known beside them.
        """
        self.observation = observation
        self.risks: dict[str, Tensor] = {}


class FusedGates:
    """The gates of all checkpoints, ready to be asked. Immutable, so threads may share it."""

    def __init__(
        self,
        fusion: Sequence[CheckpointFusion],
        kind: str,
        probes: ProbeManager,
        native: Probes | None = None,
    ) -> None:
        """Put estimators and learned weights together.

        Args:
            fusion: Weights of each checkpoint.
            kind: `"static"` or `"gated"`.
            probes: The probes.
            native: The same probes on a CPU, faster and the same for a row whatever its company.

        Raises:
            ConfigError: If there are weights for another number of checkpoints, or no network
                where one is asked for.
        """
        if len(fusion) != len(probes):
            raise ConfigError(
                f"found fusion weights for {len(fusion)} checkpoints, expected {len(probes)}."
            )
        self._fusion = tuple(fusion)
        self._accumulators: list[dict[str, EnhancedConfidenceAccumulator]] = []
        for k, each in enumerate(fusion):
            probe: LREProbe = probes.probes[k]  # type: ignore[assignment]
            fast = None if native is None else native[k]
            self._accumulators.append(
                {name: _accumulator(getattr(each, name), kind, probe, fast) for name in _GATES}
            )

    def needs_before(self, k: int) -> bool:
        """Whether a gate at checkpoint `k` looks at the states of the checkpoint before."""
        return self._keeps(k, "consistency")

    def needs_attention(self, k: int) -> bool:
        """Whether a gate at checkpoint `k` looks at how evenly its layer attends."""
        return self._keeps(k, "attention")

    def _keeps(self, k: int, modality: str) -> bool:
        return any(modality in getattr(self._fusion[k], name).kept for name in _GATES)

    def risk(self, k: int, seen: Seen) -> FloatArray:
        """The fused risk before the exit head.

        Args:
            k: Which checkpoint.
            seen: What it shows; modalities that are worked out stay in it.

        Returns:
            Risks, `[rows]`, on the host.
        """
        return _host(self._fused(k, "risk", seen))

    def sureness(self, k: int, seen: Seen, probability: FloatArray) -> FloatArray:
        """The fused counterpart of the exit's own probability: ``exp(-risk)``.

        Args:
            k: Which checkpoint.
            seen: What it has shown.
            probability: The exit's own probability, `[rows]`; NaN where it was not asked.

        Returns:
            Sureness in [0, 1], `[rows]`; NaN where the probability is, and where a modality is.
        """
        states = seen.observation.states
        own = torch.from_numpy(probability).to(states.device)
        seen.risks["perplexity"] = PerplexityEstimator(states.shape[-1], 2).risk(
            Observation(states, probability=own)
        )
        found = _host(self._fused(k, "sureness", seen).neg().exp())
        return np.where(np.isnan(probability), np.float32(np.nan), found)

    def _fused(self, k: int, gate: str, seen: Seen) -> Tensor:
        accumulator = self._accumulators[k][gate]
        for each in accumulator.estimators:
            if each.name not in seen.risks:
                seen.risks[each.name] = each.risk(seen.observation)
        risks = [seen.risks[each.name] for each in accumulator.estimators]
        return accumulator.risk_of(risks, seen.observation.states)


def _accumulator(
    weights: GateWeights, kind: str, probe: LREProbe, native: Callable[[Tensor], Tensor] | None
) -> EnhancedConfidenceAccumulator:
    width, device = probe.project.in_features, probe.project.weight.device
    network, features = None, None
    if kind == "gated" and weights.network is not None:
        # Twice as exact as needed on a CPU, as the estimators are.
        precision = torch.float64 if device.type == "cpu" else torch.float32
        network = deepcopy(weights.network).to(device, precision)
        features = deepcopy(probe).to(precision).features
    found = EnhancedConfidenceAccumulator(
        width, network is not None, gate=network, features=features
    )
    for at, name in enumerate(MODALITIES):
        if weights.weights[at] > 0:
            threshold = float(weights.thresholds[at])
            found.add_estimator(
                _estimator(name, threshold, probe, native), float(weights.weights[at])
            )
    return found


def _estimator(
    name: str, threshold: float, probe: LREProbe, native: Callable[[Tensor], Tensor] | None
) -> Estimator:
    """The estimator of a modality."""
    if name == "entropy":
        return EntropyProbeEstimator(probe, threshold, native=native)
    if name == "consistency":
        return TokenConsistencyEstimator(threshold)
    if name == "attention":
        return AttentionEntropyEstimator(threshold)
    return PerplexityEstimator(probe.project.in_features, 2, threshold)


def _host(values: Tensor) -> FloatArray:
    return np.asarray(values.detach().to("cpu", torch.float32).numpy(), np.float32)


def fusion_tensors(fusion: Sequence[CheckpointFusion] | None) -> dict[str, Tensor]:
    """The weights as tensors ``fusion.<checkpoint>.<gate>.<field>``, float32.

    Args:
        fusion: Weights of each checkpoint; none give no tensors.
    """
    tensors: dict[str, Tensor] = {}
    for k, each in enumerate(fusion or ()):
        for gate in _GATES:
            weights: GateWeights = getattr(each, gate)
            prefix = f"fusion.{k}.{gate}"
            tensors[f"{prefix}.thresholds"] = torch.tensor(weights.thresholds)
            tensors[f"{prefix}.weights"] = torch.tensor(weights.weights)
            if weights.network is not None:
                for name, value in weights.network.state_dict().items():
                    tensors[f"{prefix}.network.{name}"] = value.detach().float().cpu()
    return tensors


def fusion_from_tensors(
    tensors: Mapping[str, Tensor], checkpoints: int
) -> tuple[CheckpointFusion, ...]:
    """Inverse of `fusion_tensors`.

    Args:
        tensors: Those whose names begin with ``fusion.``, all of them.
        checkpoints: Number of checkpoints.

    Returns:
        Weights of each checkpoint.

    Raises:
        ConfigError: If a tensor is missing, has no place, or holds what is not allowed.
    """
    left = dict(tensors)
    found = []
    for k in range(checkpoints):
        gates = {}
        for gate in _GATES:
            prefix = f"fusion.{k}.{gate}."
            own = {n.removeprefix(prefix): left.pop(n) for n in list(left) if n.startswith(prefix)}
            if missing := sorted({"thresholds", "weights"} - own.keys()):
                raise ConfigError(f"tensor {prefix + missing[0]!r} is missing.")
            thresholds, weights = (
                own.pop(name).float().numpy() for name in ("thresholds", "weights")
            )
            gates[gate] = GateWeights(thresholds, weights, _network(prefix, own))
        found.append(CheckpointFusion(**gates))
    if left:
        raise ConfigError(f"tensors of fusion have no place: {sorted(left)}.")
    return tuple(found)


def _network(prefix: str, tensors: dict[str, Tensor]) -> GatedFusion | None:
    """The network of a gate from what is left of its tensors."""
    if not tensors:
        return None
    state = {name.removeprefix("network."): value.float() for name, value in tensors.items()}
    try:
        units, features = state["hidden.weight"].shape
        network = GatedFusion(features, state["out.bias"].shape[0], units)
        network.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the network under {prefix!r} is malformed: {error}.") from error
    return network.requires_grad_(False).eval()
