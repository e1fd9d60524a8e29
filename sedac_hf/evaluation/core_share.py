"""What share of a decode step is not spent in the Rust core: the interpreter's and torch's.

`sedac bench --pass` prints it. Where a streamer waits for tokens it reads two clocks whenever one
comes: the time, and the time that passes have taken. Medians over steps are compared, so that other
work on the machine, which now and then stops a step for long, does not count. Without a streamer
one call of the core runs several steps; then a long call is held against a short one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation.streamers import BaseStreamer

from sedac_hf import _core
from sedac_hf.evaluation.benchmark import greedy_settings, keep_stats

if TYPE_CHECKING:
    from sedac_hf.core.exit_stats import ExitStats
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["CoreShare", "measure_core_share"]

FloatArray = npt.NDArray[np.float64]

_WARM_UP = 8  # steps of a call that are not counted
_CALLS = 3


@dataclass(frozen=True)
class CoreShare:
    """One mode's steps (in exact mode: cycles) at batch 1.

    Attributes:
        mode: The mode.
        streamed: Whether each token was handed on as it came.
        steps: How many were counted.
        step_ms: Milliseconds of a step, median.
        outside_ms: Milliseconds of it outside the core, median.
    """

    mode: str
    streamed: bool
    steps: int
    step_ms: float
    outside_ms: float

    @property
    def outside(self) -> float:
        """Share of a step outside the core."""
        return self.outside_ms / self.step_ms


def measure_core_share(
    model: SedacForCausalLM,
    prompt: Sequence[int],
    modes: Sequence[str] = ("plain", "exact", "certified"),
    *,
    tokens: int = 96,
) -> list[CoreShare]:
    """Measure modes that run on the native pass; others, and refused ones, are left out.

    Args:
        model: The wrapped model.
        prompt: Token ids.
        modes: The modes.
        tokens: Tokens to write in each.
    """
    found = []
    for mode in modes:
        if mode in model.refused_modes:
            continue

        def write(most: int, mode: str = mode, **values: Any) -> ExitStats:
            with keep_stats(model):
                model.generate(
                    input_ids=torch.tensor([list(prompt)]),
                    sedac_mode=mode,
                    **greedy_settings(model, most),
                    **values,
                )
                return model.exit_stats

        marks = _Marks()
        if write(tokens, streamer=marks).runs_on != "native":
            continue
        found += _compare(mode, True, marks.steps()) + _compare(mode, False, _calls(write, tokens))
    return found


def _compare(mode: str, streamed: bool, steps: FloatArray) -> list[CoreShare]:
    """What steps `[steps, 2]` took in all and inside the core, seconds."""
    if not len(steps):
        return []
    step_ms = 1e3 * float(np.median(steps[:, 0]))
    outside_ms = 1e3 * float(np.median(steps[:, 0] - steps[:, 1]))
    return [CoreShare(mode, streamed, len(steps), step_ms, outside_ms)]


def _calls(write: Callable[[int], ExitStats], tokens: int) -> FloatArray:
    """Seconds of a step, and inside the core, in the quickest long call beyond a short one."""
    ends = []
    for most in (_WARM_UP, tokens):
        calls = []
        for _ in range(_CALLS):
            begun = np.array([time.perf_counter(), _core.pass_seconds()])
            stats = write(most)
            spent = np.array([time.perf_counter(), _core.pass_seconds()]) - begun
            calls.append((float(spent[0]), stats.drafts.passes or most, spent))
        ends.append(min(calls, key=lambda call: call[0]))
    (_, few, short), (_, many, long) = ends
    return np.tile((long - short) / max(many - few, 1), (max(many - few, 0), 1))


class _Marks(BaseStreamer):
    """Both clocks at the first token of each step; the tokens of one step come together."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def put(self, value: Any) -> None:
        inside = _core.pass_seconds()
        if not self.found or inside != self.found[-1][1]:
            self.found.append((time.perf_counter(), inside))

    def end(self) -> None:
        pass

    def steps(self) -> FloatArray:
        """Seconds of each step behind the first few, and those inside the core, `[steps, 2]`."""
        # The prompt itself is the first thing that a streamer is given.
        found = np.diff(np.array(self.found[1:]).reshape(-1, 2), axis=0)
        return found[_WARM_UP:]
