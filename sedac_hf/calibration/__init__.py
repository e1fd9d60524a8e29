"""Fit exits to a base model, choose thresholds, certify them, and watch them in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sedac_hf.lazy_names import lazy_names

if TYPE_CHECKING:
    from sedac_hf.calibration.adaptive_threshold import DualMetricCalibration, ThresholdUpdate
    from sedac_hf.calibration.channels import ChannelOrder, channel_order
    from sedac_hf.calibration.drift import DriftMonitor, RiskHistograms
    from sedac_hf.calibration.online import OnlineCalibration
    from sedac_hf.calibration.online_settings import OnlineSettings

__all__ = [
    "ChannelOrder",
    "DriftMonitor",
    "DualMetricCalibration",
    "OnlineCalibration",
    "OnlineSettings",
    "RiskHistograms",
    "ThresholdUpdate",
    "channel_order",
]

_HOMES = {
    "ChannelOrder": "channels",
    "DriftMonitor": "drift",
    "DualMetricCalibration": "adaptive_threshold",
    "OnlineCalibration": "online",
    "OnlineSettings": "online_settings",
    "RiskHistograms": "drift",
    "ThresholdUpdate": "adaptive_threshold",
    "channel_order": "channels",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
