"""Speed of real `generate()` calls: base, plain loop and exits, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.intervals import bootstrap_median

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM

__all__ = [
    "Ratio",
    "SpeedResult",
    "benchmark",
    "encode_prompts",
    "fresh_stats",
    "greedy_settings",
    "keep_stats",
    "ratio_of",
    "take_turns",
    "timed_call",
]


class OnDevice(Protocol):
    """What a call is given: something that lies on a device."""

    @property
    def device(self) -> torch.device:
        """The device that is worked on."""
        ...


Given = TypeVar("Given", bound=OnDevice)


@dataclass(frozen=True)
class Ratio:
    """How many times faster the measured mode is than something else.

    Attributes:
        median: Median of the ratios of paired times.
        interval: 95 % bootstrap interval of the median.
    """

    median: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class SpeedResult:
    """Times of one benchmark.

    Attributes:
        mode: Mode that was compared.
        tokens_per_second: Median over prompts and rounds, by arm: `"generate"` (the base's own
            call), `"plain"` (our loop without exits) and `"sedac"` (the mode). The prompt's pass is
            included.
        ratios: Speed of the mode against `"generate"` and against `"plain"`.
        seconds: Every time measured, by arm, `[rounds][prompts]`.
        exits: Exit statistics of the tokens generated in the mode, as `ExitStats.to_dict` has them.
        prompt_lengths: Tokens of each prompt.
        max_new_tokens: Tokens generated for each prompt.
        rounds: Rounds after the warm-up.
        seed: Seed of the bootstrap.
    """

    mode: str
    tokens_per_second: dict[str, float]
    ratios: dict[str, Ratio]
    seconds: dict[str, list[list[float]]]
    exits: dict[str, Any]
    prompt_lengths: list[int]
    max_new_tokens: int
    rounds: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)


def benchmark(
    model: SedacForCausalLM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mode: str | None = None,
    max_new_tokens: int = 64,
    rounds: int = 5,
    max_prompts: int = 8,
    seed: int = 0,
) -> SpeedResult:
    """Time greedy generation, one prompt at a time.

    Every arm writes exactly `max_new_tokens` tokens, so that an early end of text cannot look like
    speed. Within a round the arms take turns on each prompt and the order changes, so that a
    machine that slows down slows all of them. A ratio is of two times of the same prompt and round.
    The model's own `exit_stats` are left alone.

    Args:
        model: The wrapped model.
        prompts: Token ids, or texts together with a tokenizer; evenly spaced ones are used when
            there are more than `max_prompts`.
        tokenizer: Turns texts into token ids.
        mode: Mode to compare with the base and with the plain loop; None for the model's own.
        max_new_tokens: Tokens to generate for each prompt.
        rounds: Rounds after one warm-up round.
        max_prompts: Most prompts to use.
        seed: Seed of the bootstrap.

    Returns:
        Times and ratios.

    Raises:
        CalibrationError: If there is no prompt, or texts come without a tokenizer.
        ModeError: If the mode is unknown or refused for this model.
    """
    if rounds < 1 or max_new_tokens < 1 or max_prompts < 1:
        raise CalibrationError(
            "rounds, max_new_tokens and max_prompts must be at least 1, found "
            f"{rounds}, {max_new_tokens} and {max_prompts}."
        )
    mode = mode or model.config.mode
    inputs = [ids.to(model.device) for ids in encode_prompts(prompts, tokenizer, max_prompts)]
    arms = _arms(model, mode, max_new_tokens)
    stats = fresh_stats(model)
    seconds = take_turns(model, arms, inputs, rounds=rounds, counted={"sedac": stats})
    return SpeedResult(
        mode=mode,
        tokens_per_second={
            name: float(np.median(max_new_tokens / times)) for name, times in seconds.items()
        },
        ratios={
            name: ratio_of(seconds[name] / seconds["sedac"], seed) for name in ("generate", "plain")
        },
        seconds={name: times.tolist() for name, times in seconds.items()},
        exits=stats.to_dict(),
        prompt_lengths=[int(ids.shape[1]) for ids in inputs],
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        seed=seed,
    )


def take_turns(
    model: SedacForCausalLM,
    arms: Mapping[str, Callable[[Given], Any]],
    inputs: Sequence[Given],
    *,
    rounds: int,
    counted: Mapping[str, ExitStats] | None = None,
    warm_up: int | None = None,
    limit: float | None = None,
) -> dict[str, npt.NDArray[np.float64]]:
    """Time several ways to do the same; they take turns on each input, in changing order.

    Args:
        model: The model whose own statistics are to be left alone.
        arms: What to time, by name.
        inputs: What each of them is given.
        rounds: Rounds that are kept.
        counted: Statistics that an arm's kept calls count into.
        warm_up: Inputs of the round before the first, which is not kept; None for all.
        limit: Seconds after which the first round begins no further input.

    Returns:
        Seconds by arm, `[rounds, inputs]`; fewer inputs, at least one, where the limit was met.
    """
    names = list(arms)
    seconds = {name: np.empty((rounds, len(inputs))) for name in names}
    begun, used = time.monotonic(), len(inputs)
    for turn in range(-1, rounds):  # round -1 warms up and is not kept
        for at, given in enumerate(inputs[: warm_up if turn < 0 else used]):
            if limit is not None and turn == 0 < at and time.monotonic() - begun > limit:
                used = at
                break
            shift = (turn + at) % len(names)
            for name in names[shift:] + names[:shift]:
                with keep_stats(model, (counted or {}).get(name) if turn >= 0 else None):
                    spent = timed_call(arms[name], given)
                if turn >= 0:
                    seconds[name][turn, at] = spent
    return {name: times[:, :used] for name, times in seconds.items()}


def greedy_settings(model: SedacForCausalLM, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` for greedy text of an exact length.

    Args:
        model: The wrapped model.
        max_new_tokens: The length.

    Returns:
        Keyword arguments.
    """
    settings: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        # Settings of sampling that a chat model brings along; greedy search warns about them.
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": max_new_tokens,
        "return_dict_in_generate": False,
    }
    generation_config = model.base_lm.generation_config
    if generation_config is None or generation_config.pad_token_id is None:
        settings["pad_token_id"] = 0
    return settings


def _arms(
    model: SedacForCausalLM, mode: str, max_new_tokens: int
) -> dict[str, Callable[[Tensor], Any]]:
    settings = greedy_settings(model, max_new_tokens)

    def run(generate: Callable[..., Any], **extra: Any) -> Callable[[Tensor], Any]:
        return lambda ids: generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **extra
        )

    return {
        "generate": run(model.base_lm.generate),
        "plain": run(model.generate, sedac_mode="plain"),
        "sedac": run(model.generate, sedac_mode=mode),
    }


def fresh_stats(model: SedacForCausalLM) -> ExitStats:
    """Statistics without a token, of the same layers as the model's own.

    Args:
        model: The wrapped model.
    """
    return ExitStats(model.exit_stats.depth, list(model.exit_stats.exits_by_layer))


@contextmanager
def keep_stats(model: SedacForCausalLM, stats: ExitStats | None = None) -> Iterator[None]:
    """Let calls count into other statistics than the model's own.

    Args:
        model: The wrapped model.
        stats: Where to count; None keeps nothing.
    """
    own = model.exit_stats
    model.exit_stats = stats or fresh_stats(model)
    try:
        yield
    finally:
        model.exit_stats = own


def timed_call(call: Callable[[Given], Any], given: Given) -> float:
    """Seconds of one call, work queued on an accelerator included.

    Args:
        call: What to time.
        given: Its argument, on the device that is worked on.

    Returns:
        Seconds of wall-clock time.
    """
    queued = given.device.type != "cpu"
    if queued:
        torch.accelerator.synchronize(given.device)
    start = time.perf_counter()
    call(given)
    if queued:
        torch.accelerator.synchronize(given.device)
    return time.perf_counter() - start


def ratio_of(values: npt.NDArray[np.float64], seed: int) -> Ratio:
    """Median of some ratios and its interval.

    Args:
        values: The ratios, any shape, at least one.
        seed: Seed of the bootstrap.
    """
    flat = values.ravel()
    return Ratio(float(np.median(flat)), bootstrap_median(flat, seed=seed))


def encode_prompts(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    most: int,
) -> list[Tensor]:
    """Prompts as rows of token ids, evenly spaced ones when there are too many.

    Args:
        prompts: Token ids or texts.
        tokenizer: Turns texts into token ids.
        most: Most prompts to use.

    Returns:
        Token ids, `[1, length]` each.

    Raises:
        CalibrationError: If there is no prompt, one is empty, or texts come without a tokenizer.
    """
    if not prompts:
        raise CalibrationError("there are no prompts to time; pass at least one.")
    picks = np.unique(np.linspace(0, len(prompts) - 1, min(most, len(prompts))).astype(int))
    rows: list[Tensor] = []
    for prompt in (prompts[i] for i in picks):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise CalibrationError(
                    "prompts are plain texts and there is no tokenizer; pass tokenizer=..., or "
                    "token ids."
                )
            prompt = list(tokenizer(prompt)["input_ids"])
        if not len(prompt):
            raise CalibrationError("a prompt has no tokens; every prompt needs at least one.")
        rows.append(torch.tensor([list(prompt)], dtype=torch.long))
    return rows
