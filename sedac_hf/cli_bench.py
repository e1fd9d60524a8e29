"""What `sedac bench` does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from sedac_hf.cli_bench_tables import speed_table, token_table
from sedac_hf.cli_load import Loaded, let_exits_act, load, seed_everything
from sedac_hf.cli_pass import run_pass_bench
from sedac_hf.cli_run import encode_prompt
from sedac_hf.cli_support import REPOSITORY, Screen, UsageError
from sedac_hf.evaluation.arms import Arm
from sedac_hf.evaluation.bench import run_bench
from sedac_hf.evaluation.bench_plan import BenchPlan
from sedac_hf.evaluation.bench_report import bench_report, save_bench
from sedac_hf.evaluation.llama_cpp_arm import llama_cpp_arm
from sedac_hf.evaluation.prompts import load_prompts

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["plan_of", "run_benchmark", "run_passes", "show_bench"]


def run_benchmark(
    name: str,
    plan: BenchPlan,
    *,
    base: str | None,
    uncertified: bool,
    gguf: Path | None,
    threads: int | None,
    output: Path,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model, measure it and keep the result; see `sedac bench --help`."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder.")
    with _threads(threads), _hushed():
        loaded = load(name, base=base, mode=None, device=device, dtype=dtype, screen=screen)
        if uncertified:
            screen.note(let_exits_act(loaded))
        seed_everything(plan.seed)
        prompts = {group: _encoded(loaded, group) for group in plan.groups}
        llama, missing = _llama(gguf, plan, prompts)
        result = run_bench(
            loaded.model,
            prompts,
            plan,
            pad=_pad(loaded),
            in_float32=lambda: _in_float32(loaded.model),
            llama=llama,
            progress=screen.status,
        )
        result.left_out += missing
        report = bench_report(loaded.model, _shown(name), plan, result)
    kept = save_bench(report, output)
    show_bench(report, screen)
    screen.note(f"kept as {kept}")
    return report


def run_passes(
    name: str,
    *,
    with_others: bool,
    base: str | None,
    rounds: int | None,
    threads: int | None,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Time single passes; see `sedac bench --help`."""
    if with_others:
        raise UsageError(
            "--pass goes with --base, --threads, --repeats, --device and --dtype only."
        )
    with _threads(threads):
        return run_pass_bench(
            name, base=base, rounds=rounds or 20, device=device, dtype=dtype, screen=screen
        )


def plan_of(
    *,
    quick: bool,
    groups: str | None,
    batches: str | None,
    modes: str | None,
    tokens: int | None,
    prompts: int | None,
    repeats: int | None,
    seed: int,
) -> BenchPlan:
    """What the options of the command ask for.

    Args:
        quick: Sizes that end soon, where an option does not name another.
        groups: Prompt groups with commas between them; None for all, here and below.
        batches: Batch sizes.
        modes: Modes.
        tokens: Tokens of each call.
        prompts: Prompts of a group.
        repeats: Rounds that count.
        seed: Seed of the bootstrap.

    Raises:
        UsageError: If a batch size is no number.
        ConfigError: If a value is outside what it may be.
        ModeError: If a mode is unknown.
    """
    values: dict[str, Any] = dict(BenchPlan.quick_sizes()) if quick else {}
    given = {"tokens": tokens, "prompts": prompts, "repeats": repeats, "seed": seed}
    values |= {name: value for name, value in given.items() if value is not None}
    for option, text in (("groups", groups), ("modes", modes), ("batches", batches)):
        if text is None:
            continue
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        values[option] = _numbers(parts) if option == "batches" else parts
    return BenchPlan(**values)


def _numbers(parts: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in parts)
    except ValueError as error:
        raise UsageError(f"--batches {','.join(parts)}: write them as 1,4,8.") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep transformers from warning of its own assistants' arguments, call after call."""
    talk: Any = logging
    before = talk.get_verbosity()
    talk.set_verbosity_error()
    try:
        yield
    finally:
        talk.set_verbosity(before)


def _encoded(loaded: Loaded, group: str) -> list[list[int]]:
    """The prompts of a group as token ids, each a chat where the model knows one."""
    return [
        encode_prompt(loaded, prompt)["input_ids"][0].tolist() for prompt in load_prompts(group)
    ]


def _pad(loaded: Loaded) -> int:
    tokenizer: Any = loaded.tokenizer
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in found if token is not None)


def _in_float32(model: SedacForCausalLM) -> SedacForCausalLM:
    copied: Any = copy.deepcopy(model)
    exact: SedacForCausalLM = copied.float()
    return exact


def _llama(
    gguf: Path | None, plan: BenchPlan, prompts: Mapping[str, Sequence[Sequence[int]]]
) -> tuple[Arm | None, list[str]]:
    """llama.cpp where it was asked for and is there, else why not."""
    if gguf is None:
        return None, ["llama.cpp: no --gguf FILE was given"]
    longest = max(len(prompt) for group in prompts.values() for prompt in group)
    context = longest + plan.tokens + 1
    threads = torch.get_num_threads()
    found = llama_cpp_arm(gguf, tokens=plan.tokens, threads=threads, context=context)
    return (None, [f"llama.cpp: {found}"]) if isinstance(found, str) else (found, [])


def _shown(name: str) -> str:
    """The model's name without the folders that lead to the repository."""
    path = Path(name).resolve()
    if path.is_relative_to(REPOSITORY):
        return path.relative_to(REPOSITORY).as_posix()
    return path.name if path.is_dir() else name


def show_bench(report: Mapping[str, Any], screen: Screen) -> None:
    """Print a report as tables, with its conditions and what was left out below."""
    found, rows = report["conditions"], report["rows"]
    screen.out.print(speed_table(rows))
    screen.out.print(token_table(rows))
    for line in _conditions(found, rows):
        screen.out.print(line, style="dim", markup=False)
    left_out = (f"left out: {one}" for one in found["left_out"])
    for line in dict.fromkeys([*_notes(rows), *left_out]):
        screen.out.print(line, style="yellow", markup=False)


def _conditions(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    plan, here, search = found["plan"], found["machine"], found["assistant_early_exit"]
    device = here.get("accelerator") if found["device"] != "cpu" else here["processor"]
    limit = f", sized to end within {plan['seconds']:.0f} s" if plan["seconds"] else ""
    yield (
        f"Conditions: {found['model']} in {found['dtype']}, threads: {found['threads']}, on "
        f"{device or found['device']}, torch {found['versions']['torch']}, transformers "
        f"{found['versions']['transformers']}; greedy, {plan['tokens']} tokens a call, rounds: "
        f"{plan['repeats']} after a warm-up{limit}; {found['seconds']:.0f} s in all."
    )
    yield (
        "Ratios: medians over batches of paired times of arms that took turns, with 95 % "
        "intervals where there are several batches. Loop gain: plain (our own loop without exits) "
        "against generate(). Exit gain: the mode against plain on the same pass. (modules): on the "
        "base's own modules, where the native pass serves otherwise."
    )
    if search and search["layer"] is not None:
        tried = ", ".join(str(layer) for layer in search["seconds_per_token"])
        yield f"Early exit: assistant_early_exit={search['layer']}, the fastest of {tried}."
    checked = sum(row["token_checked"] for row in rows)
    yield (
        f"As base: {checked} texts compared with the base's, both in float32. Gap: the largest "
        f"distance of the base's logits where a text in {found['dtype']} first differs from the "
        "base's, and the same in units of the resolution there."
    )
    if rows:
        yield f"Share of a full pass in the output head: {rows[0]['head_share']:.1%}."


def _notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        for note in row["notes"]:
            yield f"{row['mode']}: {note}" if note.startswith("exits") else note
