"""Fit exits to a base model, choose thresholds, certify them, and watch them in use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedac_hf.calibration.adaptive_threshold import DualMetricCalibration, ThresholdUpdate
    from sedac_hf.calibration.drift import DriftMonitor, RiskHistograms
    from sedac_hf.calibration.online import OnlineCalibration
    from sedac_hf.calibration.online_settings import OnlineSettings

__all__ = [
    "DriftMonitor",
    "DualMetricCalibration",
    "OnlineCalibration",
    "OnlineSettings",
    "RiskHistograms",
    "ThresholdUpdate",
]

_HOMES = {
    "DriftMonitor": "drift",
    "DualMetricCalibration": "adaptive_threshold",
    "OnlineCalibration": "online",
    "OnlineSettings": "online_settings",
    "RiskHistograms": "drift",
    "ThresholdUpdate": "adaptive_threshold",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that light submodules stay light.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
