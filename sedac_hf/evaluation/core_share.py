"""What share of a decode step is not spent in the Rust core: the interpreter's and torch's.

`sedac bench --pass` prints it. A streamer reads two clocks whenever a token comes: the time, and
the time that passes have taken. Medians over steps are compared, so that other work on the machine,
which now and then stops a step for long, does not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from sedac_hf import _core
from sedac_hf.evaluation.benchmark import greedy_settings, keep_stats

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["CoreShare", "measure_core_share"]

_WARM_UP = 8  # steps of a call that are not counted


@dataclass(frozen=True)
class CoreShare:
    """One mode's steps (in exact mode: cycles) at batch 1.

    Attributes:
        mode: The mode.
        steps: How many were counted.
        step_ms: Milliseconds of a step, median.
        outside_ms: Milliseconds of it outside the core, median.
    """

    mode: str
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
        marks = _Marks()
        with keep_stats(model):
            model.generate(
                input_ids=torch.tensor([list(prompt)]),
                streamer=marks,
                sedac_mode=mode,
                **greedy_settings(model, tokens),
            )
            native = model.exit_stats.runs_on == "native"
        # The prompt itself is the first thing that a streamer is given.
        steps = np.diff(np.array(marks.found[1:]), axis=0)[_WARM_UP:]
        if native and len(steps):
            whole, inside = steps.T
            step_ms, outside_ms = (1e3 * float(np.median(s)) for s in (whole, whole - inside))
            found.append(CoreShare(mode, len(steps), step_ms, outside_ms))
    return found


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
