"""Variants of a cascade that online calibration puts in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig

__all__ = ["exits_off", "may_leave", "with_thresholds"]


def exits_off(cascade: CascadeConfig) -> CascadeConfig:
    """The same checkpoints with nothing leaving; risks are still seen.

    Args:
        cascade: The rules.
    """
    closed = [replace(each, threshold=0.0, exit_confidence=2.0) for each in cascade.layers]
    return replace(cascade, layers=closed)


def may_leave(layer: LayerConfig) -> bool:
    """Whether a checkpoint's rule lets anything leave.

    Args:
        layer: The rule.
    """
    return bool(layer.threshold > 0 and layer.exit_confidence <= 1 and layer.weight > 0)


def with_thresholds(cascade: CascadeConfig, thresholds: Mapping[int, float]) -> CascadeConfig:
    """The same rules with other thresholds.

    Args:
        cascade: The rules.
        thresholds: Threshold of every checkpoint, by layer.
    """
    layers = [replace(each, threshold=thresholds[each.layer_idx]) for each in cascade.layers]
    return replace(cascade, layers=layers)
