"""Online calibration, as methods of the wrapper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_hf.calibration.online import OnlineCalibration
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.calibration.adaptive_threshold import DualMetricCalibration

__all__ = ["CalibrationMethods"]


class CalibrationMethods:
    """Attach online calibration, and take it off."""

    # Transformers evaluates this annotation, so its name is imported for real.
    calibration: OnlineCalibration | None

    def attach_calibration(
        self,
        calibration: DualMetricCalibration | str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> OnlineCalibration:
        """Watch the model while it generates, and fall back to safe thresholds when need be.

        Thresholds never become looser than those that the model has now, unless `loosest` says so.
        Attach anew after `set_cascade`.

        Args:
            calibration: Limits on perplexity, throughput and drift; or a file that
                `OnlineCalibration.save` wrote, to go on from there; None for the default limits.
            **settings: Fields of `OnlineSettings`, such as `target_exit_rate` or `memory`. Not
                together with a file, which has them.

        Returns:
            What watches; also the model's attribute `calibration`.

        Raises:
            CalibrationError: If the model has no rules by which tokens leave, or the file cannot be
                used.
            ConfigError: If a setting is out of its range.
        """
        from sedac_hf.calibration.attach import attached, attached_from_file

        model: Any = self
        if isinstance(calibration, (str, os.PathLike)):
            if settings:
                raise CalibrationError(
                    f"{sorted(settings)} cannot be set beside a file, which has settings of its "
                    "own. Attach without the file, or without them."
                )
            found = attached_from_file(model, Path(calibration))
        else:
            found = attached(model, calibration, settings)
        self.calibration = found
        return found

    def detach_calibration(self) -> OnlineCalibration | None:
        """Stop watching: the thresholds that the model has act again as they are.

        Returns:
            What watched, or None.
        """
        found, self.calibration = self.calibration, None
        return found
