"""`sedac eval`: what can be asked of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sedac_hf.cli_options import (
    Base,
    Data,
    Device,
    Documents,
    Dtype,
    Json,
    Mode,
    Model,
    Quiet,
    ReportFile,
    Seed,
    TimedPrompts,
    TimedRounds,
    TimedTokens,
    Uncertified,
)
from sedac_hf.cli_support import (
    EXIT_FAILED,
    Screen,
    UsageError,
    default_artefact,
    reported,
    write_json,
)

__all__ = ["evaluate"]


@reported
def evaluate(
    model: Model = None,
    base: Base = None,
    mode: Mode = None,
    uncertified: Uncertified = False,
    data: Data = None,
    documents: Documents = 64,
    speed: Annotated[bool, typer.Option(help="Measure speed too.")] = True,
    max_new_tokens: TimedTokens = 64,
    rounds: TimedRounds = 5,
    prompts: TimedPrompts = 8,
    strategies: Annotated[
        bool,
        typer.Option(
            "--strategies", help="Compare hard, soft and adaptive-soft exits at several thresholds."
        ),
    ] = False,
    max_increase: Annotated[
        float | None,
        typer.Option(help="Exit with code 1 if perplexity rises by more (0.01 = 1 %)."),
    ] = None,
    ablation: Annotated[
        bool,
        typer.Option("--ablation", help="Measure each variant of the gates, in one table."),
    ] = False,
    output: ReportFile = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print perplexity, exits and speed beside those of the base, in one table.

    Perplexity is that of the model that generates: every token after a prompt follows the exit
    rule. Speed is that of real generate() calls at batch 1, against base.generate() and against our
    own loop without exits. Without MODEL it measures the artefact of the repository.

    With --ablation each row is a variant of the gates (entropy alone, fused, gated; decay and
    routing on and off) with the policy that fit found for it, all in one run.
    """
    from sedac_hf.cli_run import Timing, run_evaluation

    if ablation and strategies:
        raise UsageError("--ablation and --strategies are two reports; ask for one at a time.")
    screen = Screen(quiet=quiet, as_json=as_json)
    name = model or default_artefact()
    timing = Timing(max_new_tokens, rounds, prompts) if speed else None
    asked: dict[str, Any] = {
        "base": base, "data": data, "documents": documents, "output": output, "seed": seed,
        "device": device, "dtype": dtype, "screen": screen,
    }  # fmt: skip
    if ablation:
        from sedac_hf.cli_ablation import run_ablation

        if mode not in (None, "certified") or uncertified or max_increase is not None:
            raise UsageError("--ablation measures variants of certified exits, and no other mode.")
        rows = run_ablation(name, timing, **asked)
        if as_json:
            write_json(rows)
        return
    if strategies:
        from sedac_hf.cli_strategies import run_strategies

        if mode not in (None, "certified") or max_increase is not None:
            raise UsageError("--strategies measures certified mode, and no single increase.")
        curves = run_strategies(name, timing=timing, **asked)
        if as_json:
            write_json(curves)
        return
    report = run_evaluation(
        name, mode=mode, uncertified=uncertified, speed=speed, max_new_tokens=max_new_tokens,
        rounds=rounds, prompts=prompts, **asked,
    )  # fmt: skip
    if as_json:
        write_json(report)
    rise = report["ppl_increase"]
    if max_increase is not None and (rise is None or rise > max_increase):
        Screen().err.print(f"perplexity rises by more than {max_increase:.2%}", style="red")
        raise typer.Exit(EXIT_FAILED)
