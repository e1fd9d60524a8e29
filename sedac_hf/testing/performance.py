"""Does every token come in time?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from sedac_hf.evaluation.benchmark import (
    Ratio,
    encode_prompts,
    fresh_stats,
    greedy_settings,
    ratio_of,
    take_turns,
)
from sedac_hf.testing.outcome import TestOutcome

if TYPE_CHECKING:
    from sedac_hf.testing.suite_input import SuiteInput

__all__ = ["Latency", "PerformanceOutcome", "PerformanceTest", "TokenClock"]


class TokenClock(BaseStreamer):
    """Notes when the prompt was taken and when each token arrived."""

    def __init__(self) -> None:
        """Start with no times."""
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; of several tokens that come together, the later ones took none."""
        now = time.perf_counter()
        # The first value is the whole prompt.
        self.times += [now] * (int(value.numel()) if self.times else 1)

    def end(self) -> None:
        """Nothing is left to note."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per token of one model.

    The latency of a token is the time from the arrival of the token before it to its own. The first
    token of a call is left out: what it waits for is the prompt's pass.

    Attributes:
        p50: The smallest latency that at least 50 % of all latencies do not exceed.
        p95: The same with 95 %.
        p99: The same with 99 %.
        mean: Arithmetic mean.
        first_token: Median time from taking the prompt to the first token.
        count: Latencies that were measured.
    """

    p50: float
    p95: float
    p99: float
    mean: float
    first_token: float
    count: int


@dataclass(frozen=True, kw_only=True)
class PerformanceOutcome(TestOutcome):
    """Latencies and speed.

    Attributes:
        sedac: Latencies of the model in its mode.
        baseline: Latencies of the baseline's own `generate()`.
        speed: How many times faster the model is than the baseline: median over all prompts and
            rounds of the ratio of the times of the two calls, prompt's pass included.
        speed_interval: 95 % bootstrap interval of it.
        exit_share: Share of the timed tokens that left early.
        runs_on: What ran the layers in the last call; see `ExitStats.runs_on`.
        prompts: Prompts.
        rounds: Timed rounds.
        max_new_tokens: Tokens of each call.
    """

    sedac: Latency
    baseline: Latency
    speed: float
    speed_interval: tuple[float, float]
    exit_share: float
    runs_on: str
    prompts: int
    rounds: int
    max_new_tokens: int

    def details(self) -> list[tuple[str, str]]:
        """Percentiles of both, and their ratio."""
        low, high = self.speed_interval
        lines = [
            (
                f"{name}: p50 / p95 / p99, first token",
                f"{one.p50:.1f} / {one.p95:.1f} / {one.p99:.1f} ms, {one.first_token:.0f} ms",
            )
            for name, one in (("model", self.sedac), ("baseline", self.baseline))
        ]
        calls = f"{self.prompts} prompts x {self.max_new_tokens} tokens, rounds: {self.rounds}"
        return [
            *lines,
            ("speed against the baseline", f"{self.speed:.2f}x [{low:.2f}, {high:.2f}]"),
            ("timed", f"{calls}, batch 1, greedy, after a warm-up"),
        ]


class PerformanceTest:
    """The 50th, 95th and 99th percentile of the time per token are below `latency_slo_ms`.

    Real greedy `generate()` calls with a streamer that looks at the clock, one prompt at a time,
    exactly `max_new_tokens` tokens each. Baseline and model take turns on every prompt, in changing
    order; one whole round before the others warms up and is not counted. The latencies of all
    tokens of all calls are taken together, see `Latency`. With `min_speed_ratio` the median speed
    ratio of paired calls must reach it as well.

    In exact mode several tokens are accepted at once: the first of them takes the whole time, the
    others none, as a reader of the stream would see it.
    """

    name = "performance"

    def run(self, given: SuiteInput) -> PerformanceOutcome:
        """Measure.

        Args:
            given: Models, texts and limits.
        """
        config, model = given.config, given.model
        prompts = encode_prompts(given.prompts(), None, config.prompts)
        inputs = [ids.to(model.device) for ids in prompts]
        settings = greedy_settings(model, config.max_new_tokens)
        base_generate: Any = given.baseline.generate
        arms = {
            "baseline": _Timed(base_generate, settings),
            "sedac": _Timed(model.generate, settings | {"sedac_mode": given.mode}),
        }
        stats = fresh_stats(model)
        seconds = take_turns(model, arms, inputs, rounds=config.rounds, counted={"sedac": stats})
        latency = {name: arm.latency(skip=len(inputs)) for name, arm in arms.items()}
        speed = ratio_of(seconds["baseline"] / seconds["sedac"], config.seed)
        return PerformanceOutcome(
            name=self.name,
            passed=_in_time(latency["sedac"], speed, given),
            criterion=_criterion(given),
            found=f"p99 {latency['sedac'].p99:.1f} ms, {speed.median:.2f}x the baseline's speed",
            notes=_notes(latency["sedac"]),
            sedac=latency["sedac"],
            baseline=latency["baseline"],
            speed=speed.median,
            speed_interval=speed.interval,
            exit_share=stats.exit_share,
            runs_on=stats.runs_on,
            prompts=len(inputs),
            rounds=config.rounds,
            max_new_tokens=config.max_new_tokens,
        )


def _in_time(latency: Latency, speed: Ratio, given: SuiteInput) -> bool:
    config = given.config
    slo, least = config.latency_slo_ms, config.min_speed_ratio
    in_time = all(value < slo for value in (latency.p50, latency.p95, latency.p99))
    return in_time and (least is None or speed.median >= least)


def _criterion(given: SuiteInput) -> str:
    config = given.config
    words = f"p50, p95 and p99 of the time per token are below {config.latency_slo_ms:g} ms"
    if config.min_speed_ratio is not None:
        words += f", speed is at least {config.min_speed_ratio:g}x the baseline's"
    return words


def _notes(latency: Latency) -> tuple[str, ...]:
    if latency.count >= 100:
        return ()
    return (f"of {latency.count} latencies the 99th percentile is the largest.",)


class _Timed:
    """Calls of one `generate`, each with a clock of its own."""

    def __init__(self, generate: Callable[..., Any], settings: dict[str, Any]) -> None:
        self._generate = generate
        self._settings = settings
        self._calls: list[TokenClock] = []

    def __call__(self, ids: Tensor) -> None:
        clock = TokenClock()
        mask = torch.ones_like(ids)
        self._generate(input_ids=ids, attention_mask=mask, streamer=clock, **self._settings)
        self._calls.append(clock)

    def latency(self, *, skip: int) -> Latency:
        """Latencies of all calls but the first `skip`, which warmed up."""
        times = [1e3 * np.diff(clock.times) for clock in self._calls[skip:]]
        gaps = np.concatenate([one[1:] for one in times])
        p50, p95, p99 = (_percentile(gaps, share) for share in (50.0, 95.0, 99.0))
        return Latency(
            p50=p50,
            p95=p95,
            p99=p99,
            mean=float(gaps.mean()),
            first_token=float(np.median([one[0] for one in times])),
            count=len(gaps),
        )


def _percentile(values: npt.NDArray[np.float64], share: float) -> float:
    return float(cast(Any, np.percentile(values, share, method="inverted_cdf")))
