"""The rules of a cascade: one per checkpoint, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.cascade_options import (
    AdaptiveDecay,
    ClassRule,
    option_tensors,
    options_from,
)
from sedac_hf.core.exit_strategy import (
    DEFAULT_STEEPNESS,
    STRATEGIES,
    ExitStrategy,
    is_soft,
    make_strategy,
    strategy_name,
)
from sedac_hf.core.fused_gates import FUSIONS
from sedac_hf.errors import ConfigError

__all__ = ["STRATEGIES", "CascadeConfig", "LayerConfig"]

FloatArray = npt.NDArray[np.float32]

_STEEPNESS: Final = "cascade.steepness"
_TENSOR_FIELDS: Final = (
    "threshold",
    "weight",
    "decay",
    "exit_confidence",
    "min_probability",
    "temperature",
)
_LARGEST: Final = float(np.finfo(np.float32).max)
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "threshold": (0.0, _LARGEST),
    "weight": (0.0, _LARGEST),
    "decay": (0.0, 1.0),
    "exit_confidence": (0.0, _LARGEST),
    "min_probability": (0.0, 1.0),
    "temperature": (0.0, _LARGEST),
}


def _allowed(name: str) -> str:
    low, high = _RANGES[name]
    if high < _LARGEST:
        return f"a number from {low:g} to {high:g}"
    return "a finite number above 0" if name == "temperature" else "a finite number, at least 0"


@dataclass(frozen=True)
class LayerConfig:
    """The rule of one checkpoint.

    Attributes:
        layer_idx: 0-based index of the layer whose output is inspected; -1 is the embedding.
        threshold: Risk (tau) at and above which there is no confidence; 0 gives none ever.
        weight: Weight of this checkpoint's confidence.
        decay: Share (gamma) of the earlier confidence that is kept, in [0, 1].
        exit_confidence: Normalised confidence from which a row tries to exit; above 1, none does.
        min_probability: Least probability of the exit's own first choice for a try to succeed, in
            [0, 1]; 0 asks for none. Soft exits have no such choice, every try of theirs succeeds.
        temperature: Divides the logits of a hard exit before sampling.
    """

    layer_idx: int
    threshold: float = 1.0
    weight: float = 1.0
    decay: float = 0.9
    exit_confidence: float = 0.5
    min_probability: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that the cascade cannot work with.

        Raises:
            ConfigError: If a field is not finite or out of its range.
        """
        if isinstance(self.layer_idx, bool) or not isinstance(self.layer_idx, int):
            raise ConfigError(f"layer_idx must be an int, found {self.layer_idx!r}.")
        if self.layer_idx < -1:
            raise ConfigError(
                f"layer_idx must be -1 (the embedding) or more, found {self.layer_idx}."
            )
        for name in _TENSOR_FIELDS:
            value = getattr(self, name)
            low, high = _RANGES[name]
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or not low <= value <= high
                or (name == "temperature" and value == 0)
            ):
                raise ConfigError(
                    f"checkpoint after layer {self.layer_idx}: {name} must be {_allowed(name)}, "
                    f"found {value!r}."
                )


@dataclass(frozen=True)
class CascadeConfig:
    """The rules of all checkpoints.

    Attributes:
        layers: One rule per checkpoint, from the shallowest on.
        strategy: What an exit skips: "hard" skips every later layer, "soft" and "adaptive-soft" the
            less important channels of their MLPs (see `sedac_hf.core.exit_strategy`).
        target_exit_rate: Share of tokens, in (0, 1), that `aim_thresholds` lets leave where there
            is no calibration; None if thresholds are final.
        steepness: How fast the share that a soft exit skips rises with confidence: `k` of
            `soft_exit_mlp_scaling`.
        fusion: What risk and probability are: "none" for the probe's and the exit's own, "static"
            or "gated" for those fused with other evidence.
        adaptive_decay: How the decay follows a text; None keeps it as it is.
        routes: How the rules differ by class of the token just read, one entry a class; none for
            the same rules for all.
    """

    layers: Sequence[LayerConfig]
    strategy: str = "hard"
    target_exit_rate: float | None = None
    steepness: float = DEFAULT_STEEPNESS
    fusion: str = "none"
    adaptive_decay: AdaptiveDecay | None = None
    routes: Sequence[ClassRule] = ()

    def __post_init__(self) -> None:
        """Refuse an empty or unordered cascade.

        Raises:
            ConfigError: If there is no checkpoint, their layers do not increase, or a field is not
                one of those known.
        """
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "routes", tuple(self.routes))
        if not self.layers:
            raise ConfigError("a cascade needs at least one checkpoint, found none.")
        indices = self.layer_indices
        if any(later <= earlier for earlier, later in pairwise(indices)):
            raise ConfigError(
                f"checkpoints must be in increasing order of their layers, found {list(indices)}."
            )
        object.__setattr__(self, "strategy", strategy_name(self.strategy))
        _ = self.exit_strategy  # refuses a bad steepness
        if self.fusion not in FUSIONS:
            raise ConfigError(f"fusion must be one of {FUSIONS}, found {self.fusion!r}.")
        rate = self.target_exit_rate
        if rate is not None and not 0 < rate < 1:
            raise ConfigError(f"target_exit_rate must lie between 0 and 1, found {rate!r}.")

    @property
    def exit_strategy(self) -> ExitStrategy:
        """What an exit skips, as an object that says how much."""
        return make_strategy(self.strategy, self.steepness)

    @property
    def is_soft(self) -> bool:
        """Whether exits run the tail on fewer channels."""
        return is_soft(self.strategy)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Layer of every checkpoint."""
        return tuple(layer.layer_idx for layer in self.layers)

    def array(self, name: str) -> FloatArray:
        """One field of all checkpoints.

        Args:
            name: A field of `LayerConfig`.

        Returns:
            Its values, ``[checkpoints]``.
        """
        return np.array([getattr(layer, name) for layer in self.layers], np.float32)

    def to_tensors(self) -> dict[str, Tensor]:
        """The rules as tensors ``cascade.<field>``, float32, ``[checkpoints]`` each.

        Rules of soft exits also have a ``cascade.steepness`` of one number; of hard ones, which do
        not use it, it is not kept. Options that are not used add none. What `from_tensors` makes of
        them equals this configuration rounded to float32, which is the precision that decisions are
        made in.
        """
        found = {f"cascade.{name}": torch.from_numpy(self.array(name)) for name in _TENSOR_FIELDS}
        if self.is_soft:
            found[_STEEPNESS] = torch.tensor([self.steepness], dtype=torch.float32)
        return found | option_tensors(self)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        layer_indices: Sequence[int],
        *,
        strategy: str = "hard",
        target_exit_rate: float | None = None,
    ) -> CascadeConfig:
        """Inverse of `to_tensors`.

        Args:
            tensors: At least the tensors that `to_tensors` gives; others are left alone.
            layer_indices: Layer of every checkpoint.
            strategy: As in the class.
            target_exit_rate: As in the class.

        Returns:
            The configuration.

        Raises:
            ConfigError: If a tensor is missing, has another shape, or holds a value that is not
                allowed, NaN included.
        """
        values: dict[str, list[float]] = {}
        for name in _TENSOR_FIELDS:
            key = f"cascade.{name}"
            if key not in tensors:
                raise ConfigError(f"tensor {key!r} is missing.")
            tensor = tensors[key]
            if tensor.shape != (len(layer_indices),):
                raise ConfigError(
                    f"tensor {key!r} must hold one value per checkpoint, expected shape "
                    f"({len(layer_indices)},), found {tuple(tensor.shape)}."
                )
            values[name] = tensor.detach().float().cpu().tolist()
        layers = tuple(
            LayerConfig(layer_idx, **{name: values[name][k] for name in _TENSOR_FIELDS})
            for k, layer_idx in enumerate(layer_indices)
        )
        steepness = tensors.get(_STEEPNESS)
        if steepness is not None and steepness.numel() != 1:
            raise ConfigError(f"tensor {_STEEPNESS!r} must hold one number, found {steepness}.")
        return cls(
            layers,
            strategy=strategy,
            target_exit_rate=target_exit_rate,
            steepness=DEFAULT_STEEPNESS if steepness is None else float(steepness),
            **options_from(tensors),
        )
