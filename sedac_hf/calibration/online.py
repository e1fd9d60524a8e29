"""Online calibration: watches a model generate, and makes its thresholds safer when it has to.

What acts is never looser than the policy that was chosen (and certified), unless `loosest` says so:
on drift of the risks the safest certified policy takes over, or exits go off; a broken bound turns
them off; they come back when all has been well for long enough.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_hf.calibration.adaptive_threshold import DualMetricCalibration
from sedac_hf.calibration.drift import DriftMonitor, RiskHistograms
from sedac_hf.calibration.live_quality import QualityMonitor
from sedac_hf.calibration.observations import Observations
from sedac_hf.calibration.online_settings import OnlineSettings
from sedac_hf.calibration.protection import Protection, Signals
from sedac_hf.calibration.safe_rules import exits_off, may_leave, with_thresholds
from sedac_hf.calibration.throughput import ThroughputMonitor
from sedac_hf.core.aiming import aim_thresholds
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.errors import CalibrationError, SedacError
from sedac_hf.files import write_atomically

__all__ = ["STATE_VERSION", "OnlineCalibration"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
STATE_VERSION = 1


class OnlineCalibration:
    """What is known of a model's exits from its own use; shared by all its calls and threads.

    Attributes:
        chosen: The policy that was chosen, and certified if the model has a certificate.
        rules: Limits and thresholds.
        settings: How it watches and reacts.
    """

    def __init__(
        self,
        chosen: CascadeConfig,
        *,
        histograms: RiskHistograms | None = None,
        rung: CascadeConfig | None = None,
        rules: DualMetricCalibration | None = None,
        settings: OnlineSettings | None = None,
    ) -> None:
        """Begin with the policy as it was chosen; see `SedacForCausalLM.attach_calibration`.

        Args:
            chosen: The policy.
            histograms: Risks of calibration; without them drift cannot be known.
            rung: A safer certified policy.
            rules: Limits; None for the defaults. Its thresholds become those of the policy.
            settings: How to watch and react; None for the defaults.
        """
        self.settings = settings = settings or OnlineSettings()
        self.rules = rules or DualMetricCalibration()
        self.chosen = chosen
        self._layers = chosen.layer_indices
        thresholds = {layer.layer_idx: layer.threshold for layer in chosen.layers}
        bounds = {k: (0.0, v * settings.loosest) for k, v in thresholds.items()}
        self.rules.begin(thresholds, bounds)
        self._rung = rung if settings.fallback == "rung" else None
        limit = math.log1p(self.rules.ppl_tolerance)
        self._quality = QualityMonitor(len(self._layers), limit, memory=settings.memory)
        self._histograms = histograms
        self._drift: DriftMonitor | None = None
        if histograms is not None:
            self._drift = DriftMonitor(histograms, memory=settings.memory)
        self._open = [k for k, layer in enumerate(chosen.layers) if may_leave(layer)]
        self._protection = Protection(
            self.rules.drift_threshold,
            has_rung=self._rung is not None,
            recovery=settings.recovery,
            patience=settings.patience,
        )
        self._throughput = ThroughputMonitor(settings.memory)
        self._recent: deque[FloatArray] = deque(maxlen=settings.memory)
        self._until_aim = settings.memory // 4
        self._lock = threading.Lock()
        self._tokens = self._calls = 0
        self._adapted = chosen
        self._now = (chosen, self._protection.level)

    # -- what it says ------------------------------------------------------------------------

    @property
    def cascade(self) -> CascadeConfig:
        """The rules in force."""
        return self._now[0]

    @property
    def level(self) -> str:
        """`"certified"` (the policy chosen), `"rung"` (a safer one) or `"off"`."""
        return self._now[1]

    @property
    def exit_rate(self) -> float | None:
        """Share of tokens that thresholds aim at; None where they are left alone."""
        rate = self.settings.target_exit_rate
        return self.chosen.target_exit_rate if rate is None else rate

    @property
    def in_force(self) -> tuple[CascadeConfig, str]:
        """The rules in force and their level, of one moment."""
        return self._now

    @property
    def reason(self) -> str:
        """Why it has fallen back, `"drift"` or `"quality"`; empty when it has not."""
        return self._protection.reason

    @property
    def drift(self) -> float | None:
        """Largest divergence of risks at an open checkpoint, nats; None while it is not known."""
        with self._lock:
            return self._largest_drift()

    @property
    def ppl_increase(self) -> float | None:
        """Rise of perplexity under the policy chosen, as a fraction; None before any token."""
        with self._lock:
            return self._rise()

    @property
    def throughput(self) -> float | None:
        """Steps per second as a multiple of those without exits; None while it is not known."""
        with self._lock:
            return self._throughput.ratio

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values, for people and for metrics."""
        with self._lock:
            drift = [self._drift and self._drift.drift(k) for k in range(len(self._layers))]
            agreement = self._quality.agreement()
            return {
                "level": self._now[1],
                "reason": self._protection.reason,
                "fallbacks": self._protection.fallbacks,
                "recoveries": self._protection.recoveries,
                "tokens": self._tokens,
                "ppl_increase": self._rise(),
                "ppl_tolerance": self.rules.ppl_tolerance,
                "drift": self._largest_drift(),
                "drift_threshold": self.rules.drift_threshold,
                "throughput": self._throughput.ratio,
                "throughput_target": self.rules.throughput_target,
                "drift_by_layer": dict(zip(self._layers, drift, strict=True)),
                "agreement_by_layer": dict(zip(self._layers, agreement, strict=True)),
                "thresholds": {each.layer_idx: each.threshold for each in self._now[0].layers},
                "updates": self.rules.outcomes,
            }

    # -- what it is told ---------------------------------------------------------------------

    def next_call(self) -> int:
        """Number of a new call, from 0."""
        with self._lock:
            self._calls += 1
            return self._calls - 1

    def take(self, seen: Observations) -> None:
        """Learn from what a call has seen, and act on it.

        Args:
            seen: What it has seen since it last reported.
        """
        with self._lock:
            self._learn(seen)
            change = self._protection.judge(seen.tokens, self._signals())
            if self._protection.level == "certified" and change is None:
                self._aim(seen.tokens)
            self._now = self._in_force()
            if change is not None:
                self._say(change)

    def _learn(self, seen: Observations) -> None:
        self._tokens += seen.tokens
        if seen.passed:
            self._quality.passed(seen.passed)
        for k, tokens in seen.passed_at.items():
            self._quality.passed(tokens, k)
        for exits in seen.judged:
            for k in np.unique(exits.checkpoints).tolist():
                at = exits.checkpoints == k
                self._quality.judged(k, exits.divergence[at], exits.agree[at], exits.share)
        if self._drift is not None:
            for k, risks, weight in seen.risks:
                self._drift.observe(k, risks, weight)
        for rows in seen.rows:
            self._recent.extend(rows)
        self._throughput.add(seen.plain, seen.steps)

    def _signals(self) -> Signals:
        return Signals(
            drift=self._largest_drift(),
            measures_drift=self._drift is not None and bool(self._open),
            broken=self._quality.is_broken,
            sound=self._quality.is_sound,
        )

    def _largest_drift(self) -> float | None:
        if self._drift is None:
            return None
        known = [self._drift.drift(k) for k in self._open]
        return max((each for each in known if each is not None), default=None)

    def _rise(self) -> float | None:
        rise = self._quality.rise
        return None if rise is None else math.expm1(rise)

    def _aim(self, tokens: int) -> None:
        """Ask for thresholds at the quantile of recent risks that the exit rate says."""
        rate = self.exit_rate
        self._until_aim -= tokens
        if rate is None or self._until_aim > 0 or len(self._recent) < self.settings.memory // 4:
            return
        self._until_aim = self.settings.memory // 4
        aimed = aim_thresholds(self._adapted, np.stack(self._recent), rate)
        metrics = {"ppl_increase": self._rise(), "throughput": self._throughput.ratio}
        if self._drift is not None:
            metrics["drift"] = self._largest_drift()
        for k, layer in enumerate(aimed.layers):
            if layer.threshold != self._adapted.layers[k].threshold:
                self.rules.update_threshold(layer.layer_idx, layer.threshold, metrics)
        self._adapted = with_thresholds(self.chosen, self.rules.thresholds)

    def _in_force(self) -> tuple[CascadeConfig, str]:
        level = self._protection.level
        if level == "certified":
            return self._adapted, level
        if level == "rung" and self._rung is not None:
            return self._rung, level
        return exits_off(self.chosen), "off"

    def _say(self, change: str) -> None:
        drift, rise = self._largest_drift(), self._rise()
        figures = (
            f"drift of risks {_shown(drift, '{:.3f}')} nats (at most "
            f"{self.rules.drift_threshold:g}), rise of perplexity {_shown(rise, '{:.2%}')} (at "
            f"most {self.rules.ppl_tolerance:.2%})"
        )
        if change == "recovery":
            logger.info("Exits act again by the policy that was chosen: %s.", figures)
            return
        what = "the text is unlike that of calibration"
        if self._protection.reason == "quality":
            what = "exits cost more than they may"
        now = "exits are off" if self.level == "off" else "the safest certified policy acts"
        logger.warning(
            "Online calibration fell back: %s. %s; %s until it has been well for %d tokens.",
            what,
            figures,
            now,
            self._protection.wait,
        )

    # -- its state on disk -------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on from here, as JSON values."""
        with self._lock:
            return {
                "version": STATE_VERSION,
                "made_for": self._made_for(),
                "settings": self.settings.to_dict(),
                "rules": self.rules.to_dict() | {"smoothing": self.rules.smoothing},
                "protection": self._protection.to_dict(),
                "quality": self._quality.to_dict(),
                "drift": None if self._drift is None else self._drift.to_dict(),
                "throughput": self._throughput.to_dict(),
                "tokens": self._tokens,
                "calls": self._calls,
            }

    def save(self, path: str | Path) -> None:
        """Write the state to a JSON file, whole or not at all.

        Args:
            path: The file.
        """
        write_atomically(Path(path), json.dumps(self.state(), indent=2, allow_nan=False) + "\n")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; limits and settings stay as they are here.

        Args:
            state: What `state` gave.

        Raises:
            CalibrationError: If it is malformed, or was made for another policy or artefact.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise CalibrationError(
                    f"it has version {state['version']!r}, this sedac_hf reads {STATE_VERSION}"
                )
            if state["made_for"] != self._made_for():
                raise CalibrationError("it was made for other thresholds or calibration risks")
            counts = [state["tokens"], state["calls"]]
            if not all(type(each) is int and each >= 0 for each in counts):
                raise CalibrationError(f"tokens and calls must be whole numbers, found {counts}")
            with self._lock:
                self.rules.restore(state["rules"])
                self._protection.restore(state["protection"])
                self._quality.restore(state["quality"])
                if self._drift is not None:
                    self._drift.restore(state["drift"])
                self._throughput.restore(state["throughput"])
                self._tokens, self._calls = counts
                self._adapted = with_thresholds(self.chosen, self.rules.thresholds)
                self._now = self._in_force()
        except (SedacError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"the state of online calibration cannot be used: {error}. Attach a fresh one, or "
                "the one that was saved with this artefact."
            ) from error

    def _made_for(self) -> str:
        """Digest of what the state means anything for."""
        digest = hashlib.sha256(repr(self._layers).encode())
        # In the float32 that rules are stored and act in.
        for name, value in sorted(self.chosen.to_tensors().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        if self._histograms is not None:
            for each in fields(self._histograms):
                digest.update(getattr(self._histograms, each.name).tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out: it cannot be copied."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _shown(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)
