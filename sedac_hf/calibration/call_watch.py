"""One call of a model under online calibration: what it sees, and by which rules it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf.calibration.observations import Observations
from sedac_hf.calibration.safe_rules import exits_off

if TYPE_CHECKING:
    from sedac_hf.calibration.online import OnlineCalibration
    from sedac_hf.core.cascade_controller import CascadeConfig, CascadeController
    from sedac_hf.core.observers import JudgedExits
    from sedac_hf.core.session import StepRecord

__all__ = ["CallWatch"]

Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]

# Steps between reports: a report takes a lock and counts, a step only notes.
_STEPS = 16
# Kinds of steps: under the rules; at full depth, to see what the rules would have done, or only to
# see how long that takes.
_USUAL, _LOOKED, _TIMED = 0, 1, 2


class CallWatch:
    """Implements `ExitWatch` for one call, in one thread."""

    def __init__(
        self,
        calibration: OnlineCalibration,
        controller: Callable[[CascadeConfig], CascadeController],
        *,
        follows: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin a call.

        Args:
            calibration: What the call reports to.
            controller: Makes a cascade of rules.
            follows: Whether the rules in force act in this call; in exact mode none do, and
                those that were chosen are looked at.
            clock: Seconds.
        """
        self._calibration = calibration
        self._controller_of = controller
        self._follows = follows
        self._clock = clock
        settings = calibration.settings
        self._audit_share = settings.audit_share
        self._full_share = settings.full_depth_share
        self._rng = np.random.default_rng((settings.seed, calibration.next_call()))
        self._seen = Observations()
        self._records: list[tuple[StepRecord, Mask | None, int]] = []
        self._tokens = 0
        self._kind = _USUAL
        self._again = False  # whether the next step is to be timed too
        # Only what loosens asks for the throughput.
        self._times = follows and calibration.exit_rate is not None
        self._last: float | None = None  # when the last step was told
        self._quiet = False  # whether nothing had left in it
        self._config: CascadeConfig | None = None
        self._take_rules()

    @property
    def cascade(self) -> CascadeController:
        """The rules from the next step on."""
        return self._cascade

    def look(self) -> CascadeController | None:
        """After a fallback some steps look at what the policy chosen would have done."""
        chosen = self._calibration.chosen
        if self._fallen:
            self._kind = _LOOKED if self._rng.random() < self._full_share else _USUAL
            return self._controller_of(chosen) if self._kind == _LOOKED else None
        if not self._times:
            return None
        # In pairs: the first step also runs what earlier exits have left behind.
        begins = not self._again and bool(self._rng.random() < self._full_share / 2)
        self._kind = _TIMED if begins or self._again else _USUAL
        self._again = begins
        return self._controller_of(exits_off(chosen)) if self._kind == _TIMED else None

    def share(self, *, runs_on: bool) -> float:
        """Chance with which `pick` chooses each."""
        return self._full_share if runs_on else self._audit_share

    def pick(self, leaving: Mask, *, runs_on: bool) -> Mask:
        """Choose among exits those to be held against full depth."""
        if self._kind == _LOOKED:
            return leaving
        if self._fallen:
            # What is judged is the policy that was chosen, not the one that stands in for it.
            return np.zeros_like(leaving)
        share = self.share(runs_on=runs_on)
        return leaving & (self._rng.random(len(leaving)) < share)

    def judge(self, exits: JudgedExits) -> None:
        """Take note of exits that were held against full depth."""
        seen = self._seen
        seen.judged.append(exits)
        if self._kind == _LOOKED or not self._follows:
            return
        # At later checkpoints only exits that were looked at are known: each stands for others.
        # Those that were run on are in the record of their step already.
        weight = 1 / exits.share - (0 if exits.left else 1)
        for k in range(exits.risks.shape[1]):
            later = (exits.checkpoints < k) & ~np.isnan(exits.risks[:, k])
            if later.any() and weight > 0:
                seen.risks.append((k, exits.risks[later, k], weight))
        whole = exits.risks[np.isfinite(exits.risks).all(axis=1)]
        seen.rows.append(np.repeat(whole, round(weight), axis=0))

    def verified(self, k: int, risks: FloatArray) -> None:
        """Take note of tokens that exact mode verified."""
        seen = self._seen
        seen.tokens += len(risks)
        seen.passed_at[k] = seen.passed_at.get(k, 0.0) + len(risks)
        seen.risks.append((k, risks, 1.0))
        self._tokens += len(risks)
        if self._tokens >= _STEPS:
            self._report()

    def observe(self, record: StepRecord, live: Mask | None) -> None:
        """Note a step; every few of them are reported."""
        now = self._clock()
        left = bool((record.checkpoints >= 0).any())
        if self._last is not None and self._follows and not self._fallen:
            seconds, seen = now - self._last, self._seen
            if self._kind == _USUAL:
                seen.steps = (seen.steps[0] + seconds, seen.steps[1] + 1)
            if self._quiet and not left:
                seen.plain = (seen.plain[0] + seconds, seen.plain[1] + 1)
        self._last, self._quiet = now, not left
        self._records.append((record, live, self._kind))
        self._kind = _USUAL
        if len(self._records) >= _STEPS:
            self._report()

    def end(self) -> None:
        """Report the rest."""
        self._report()

    def _report(self) -> None:
        for kind in (_USUAL, _LOOKED, _TIMED):
            chosen = [each for each in self._records if each[2] == kind]
            if chosen:
                self._count(chosen, kind)
        seen, self._seen = self._seen, Observations()
        self._records, self._tokens = [], 0
        if seen.tokens or seen.judged:
            self._calibration.take(seen)
            self._take_rules()

    def _count(self, steps: list[tuple[StepRecord, Mask | None, int]], kind: int) -> None:
        """Turn steps of one kind into observations."""
        rows = [np.ones(len(r.layers), np.bool_) if live is None else live for r, live, _ in steps]
        live = np.concatenate(rows)
        risks = np.concatenate([record.risks for record, _, _ in steps])[live]
        seen_by = np.concatenate([record.confidences for record, _, _ in steps])[live]
        at = np.concatenate([record.checkpoints for record, _, _ in steps])[live]
        # A checkpoint that was asked gave a confidence, whatever it made of the risk.
        asked = ~np.isnan(seen_by) | ~np.isnan(risks)
        tokens = asked.any(axis=1)
        seen, count = self._seen, int(tokens.sum())
        seen.tokens += count
        if kind == _LOOKED:
            seen.passed += count / self._full_share
        elif kind == _USUAL and not self._fallen:
            seen.passed += count
        # Behind the first checkpoint that lets tokens leave, those that come are a choice; after a
        # fallback nobody stands for the others, so they are not counted.
        last = self._first_open if self._fallen and kind == _USUAL else risks.shape[1] - 1
        for k in range(min(last, risks.shape[1] - 1) + 1):
            known = asked[:, k]
            seen.risks.append((k, risks[known, k], 1.0))
        if not self._fallen:
            whole = tokens & (at < 0) & np.isfinite(risks).all(axis=1)
            seen.rows.append(risks[whole])

    def _take_rules(self) -> None:
        config, level = self._calibration.in_force
        if not self._follows:
            config = self._calibration.chosen
        self._fallen = self._follows and level != "certified"
        if self._config is not config:
            self._config, self._cascade = config, self._controller_of(config)
        may = [k for k, each in enumerate(config.layers) if each.exit_confidence <= 1]
        self._first_open = min(may, default=len(config.layers))
