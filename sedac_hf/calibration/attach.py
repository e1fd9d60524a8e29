"""Online calibration for a model at hand: which policy, which safer rung, which risks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_hf.calibration.adaptive_threshold import DualMetricCalibration
from sedac_hf.calibration.online import OnlineCalibration
from sedac_hf.calibration.online_settings import OnlineSettings
from sedac_hf.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["attached", "attached_from_file", "safest_rung"]

logger = logging.getLogger(__name__)


def attached(
    model: SedacForCausalLM, rules: DualMetricCalibration | None, settings: Mapping[str, Any]
) -> OnlineCalibration:
    """Online calibration that begins afresh.

    Args:
        model: The model.
        rules: Limits; None for the defaults.
        settings: Fields of `OnlineSettings`.

    Raises:
        CalibrationError: If the model has no rules by which tokens leave.
        ConfigError: If a setting is unknown or out of its range.
    """
    if model.cascade is None:
        raise CalibrationError(
            "the model has no rules by which tokens leave, so there is nothing to calibrate. Fit "
            "exits with sedac_hf.fit, or give some with model.set_cascade."
        )
    if model.cascade.is_soft:
        raise CalibrationError(
            f"online calibration watches hard exits, and the model's are {model.cascade.strategy}: "
            "they ask no exit head whose answer could be held against full depth. Use "
            "sedac_mode='exact' or the strategy 'hard' with it."
        )
    try:
        given = OnlineSettings(**settings)
    except TypeError as error:
        known = sorted(OnlineSettings.__dataclass_fields__)
        raise ConfigError(f"settings of online calibration are {known}: {error}.") from error
    if model.risk_histograms is None:
        logger.warning(
            "The artefact holds no histograms of risks, so drift cannot be seen: quality alone is "
            "watched. Set model.risk_histograms = RiskHistograms.measure(model, documents) first."
        )
    return OnlineCalibration(
        model.cascade,
        histograms=model.risk_histograms,
        rung=safest_rung(model),
        rules=rules,
        settings=given,
    )


def attached_from_file(model: SedacForCausalLM, path: Path) -> OnlineCalibration:
    """Online calibration that goes on from a file.

    Args:
        model: The model.
        path: What `OnlineCalibration.save` wrote.

    Raises:
        CalibrationError: If it cannot be read, is malformed, or was made for another policy.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        rules = state["rules"]
        limits = ("ppl_tolerance", "throughput_target", "drift_threshold", "smoothing")
        dual = DualMetricCalibration(**{name: rules[name] for name in limits})
        found = attached(model, dual, state["settings"])
        found.restore(state)
    except (CalibrationError, ConfigError, OSError, KeyError, TypeError, ValueError) as error:
        message = f"missing field {error}" if isinstance(error, KeyError) else str(error)
        raise CalibrationError(f"{path}: {message}") from error
    return found


def safest_rung(model: SedacForCausalLM) -> CascadeConfig | None:
    """The safest policy that was certified, if it is not the one in use; else None.

    Args:
        model: The model.
    """
    certificate = model.certificate
    if certificate is None or certificate.policy is None or model.exits_off_reason is not None:
        return None
    first = certificate.walk[0].policy.cascade
    # Certified policies say nothing of thresholds that somebody set.
    return first if model.cascade == certificate.policy.cascade != first else None
