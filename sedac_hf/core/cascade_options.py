"""What a cascade may do beside its plain rules: adapt its decay, tell kinds of tokens apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.core.fused_gates import FUSIONS
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig

__all__ = ["AdaptiveDecay", "ClassRule", "option_tensors", "option_values", "options_from"]


@dataclass(frozen=True)
class AdaptiveDecay:
    """How the decay follows a text: see `adaptive_confidence_decay`.

    Attributes:
        scale: Running entropy of full depth, nats, from which a text counts as wholly uncertain.
        bonus: What is added where every recent try led to an exit, at least 0.
        momentum: Share of a running mean that stays at each new value, in [0, 1).
    """

    scale: float
    bonus: float = 0.25
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse values that no text can be followed by.

        Raises:
            ConfigError: If a field is not finite or out of its range.
        """
        for name, low, high in (("scale", 0.0, math.inf), ("bonus", 0.0, 1e6), ("momentum", 0, 1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value < high) or (name, value) == ("scale", 0):
                raise ConfigError(
                    f"adaptive decay: {name} must be finite, at least {low:g}"
                    f"{' and below 1' if high == 1 else ''}{', not 0' if name == 'scale' else ''}; "
                    f"found {value!r}."
                )


@dataclass(frozen=True)
class ClassRule:
    """How the rules differ for one class of tokens.

    Attributes:
        threshold: Factor of every checkpoint's risk threshold; 0 lets none of the class leave.
        gap: Factor of what a checkpoint's least probability lacks to 1.
    """

    threshold: float = 1.0
    gap: float = 1.0

    def __post_init__(self) -> None:
        """Refuse factors that are negative or not finite.

        Raises:
            ConfigError: If a factor is.
        """
        for name in ("threshold", "gap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"a class of tokens: factor {name} must be finite and at least 0, "
                    f"found {value!r}."
                )

    def threshold_of(self, layer: LayerConfig) -> float:
        """The class's own risk threshold at a checkpoint."""
        return float(torch.tensor(layer.threshold) * torch.tensor(self.threshold))

    def least_of(self, layer: LayerConfig) -> float:
        """The class's own least probability at a checkpoint; 0 where none is asked for at all."""
        if layer.min_probability <= 0:
            return 0.0
        gap = (1 - torch.tensor(layer.min_probability)) * torch.tensor(self.gap)
        # Some probability is asked for, however little: the exit must be able to speak at all.
        return max(float(1 - gap), 1e-6)


def option_tensors(cascade: CascadeConfig) -> dict[str, Tensor]:
    """The options that are used, as tensors ``cascade.<field>``; none for a plain cascade.

    Args:
        cascade: The rules.
    """
    tensors: dict[str, Tensor] = {}
    if cascade.fusion != "none":
        code = FUSIONS.index(cascade.fusion)
        tensors["cascade.fusion"] = torch.tensor([code], dtype=torch.uint8)
    if cascade.adaptive_decay is not None:
        rule = cascade.adaptive_decay
        tensors["cascade.adaptive_decay"] = torch.tensor([rule.scale, rule.bonus, rule.momentum])
    if cascade.routes:
        tensors["cascade.routes"] = torch.tensor([[r.threshold, r.gap] for r in cascade.routes])
    return tensors


def options_from(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of `option_tensors`: fields of `CascadeConfig`.

    Args:
        tensors: At least those of the options; others are left alone.

    Raises:
        ConfigError: If one has another shape, or holds what is not allowed.
    """
    found: dict[str, Any] = {}
    if "cascade.fusion" in tensors:
        codes = _shaped(tensors, "cascade.fusion", (1,)).tolist()
        if not 0 < codes[0] < len(FUSIONS):
            raise ConfigError(
                f"tensor 'cascade.fusion' must be a number from 1 to {len(FUSIONS) - 1}, found "
                f"{codes[0]}. The artefact may have been written by a newer sedac_hf: upgrade it."
            )
        found["fusion"] = FUSIONS[codes[0]]
    if "cascade.adaptive_decay" in tensors:
        found["adaptive_decay"] = AdaptiveDecay(
            *_shaped(tensors, "cascade.adaptive_decay", (3,)).float().tolist()
        )
    if "cascade.routes" in tensors:
        routes = tensors["cascade.routes"]
        values = _shaped(tensors, "cascade.routes", (len(routes), 2)).float().tolist()
        found["routes"] = tuple(ClassRule(*each) for each in values)
    return found


def option_values(cascade: CascadeConfig) -> dict[str, Any]:
    """The options that are used as JSON values; none for a plain cascade.

    Args:
        cascade: The rules.
    """
    return {name: value.tolist() for name, value in option_tensors(cascade).items()}


def _shaped(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ConfigError(f"tensor {name!r} must have shape {shape}, found {tuple(tensor.shape)}.")
    return tensor.detach().cpu()
