"""`sedac bench`: what can be asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_hf.cli_options import Base, Device, Dtype, Json, Model, Quiet, Seed, Uncertified
from sedac_hf.cli_support import Screen, default_artefact, reported, write_json

__all__ = ["bench"]


@reported
def bench(
    model: Model = None,
    base: Base = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few prompts, short texts: within ten minutes.")
    ] = False,
    groups: Annotated[
        str | None, typer.Option(help="Prompt groups, as chat,code,grounded.")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes, as 1,4,8.")] = None,
    modes: Annotated[str | None, typer.Option(help="Modes, as exact,certified,plain,off.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each call.", min=1)] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts of a group.", min=1)] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds that count.", min=1)] = None,
    uncertified: Uncertified = False,
    gguf: Annotated[
        Path | None,
        typer.Option(help="The same weights as a GGUF file: a row for llama.cpp."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.", min=1)] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that results are kept in.")
    ] = Path("benchmarks/results"),
    passes: Annotated[
        bool,
        typer.Option("--pass", help="Time passes of 1 to 16 tokens instead: native beside torch."),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print how fast each mode writes, as ratios, and whether the tokens are the base's.

    Modes take turns with base.generate(), with our own loop without exits (plain) and, at batch 1,
    with assistant_early_exit and prompt_lookup_num_tokens. What the loop gains and what exits gain
    are two columns. Without MODEL it measures the artefact of the repository.

    With --pass it times single passes of the base at contexts of 128, 1,024 and 8,192, and says
    what share of the memory's measured bandwidth they reach; --base, --threads, --repeats, --device
    and --dtype apply.
    """
    from sedac_hf.cli_bench import plan_of, run_benchmark, run_passes

    screen = Screen(quiet=quiet, as_json=as_json)
    if passes:
        others = (quick, groups, batches, modes, tokens, prompts, uncertified, gguf)
        timed = run_passes(
            model or default_artefact(),
            with_others=any(others),
            base=base,
            rounds=repeats,
            threads=threads,
            device=device,
            dtype=dtype,
            screen=screen,
        )
        if as_json:
            write_json(timed)
        return
    plan = plan_of(
        quick=quick,
        groups=groups,
        batches=batches,
        modes=modes,
        tokens=tokens,
        prompts=prompts,
        repeats=repeats,
        seed=seed,
    )
    report = run_benchmark(
        model or default_artefact(),
        plan,
        base=base,
        uncertified=uncertified,
        gguf=gguf,
        threads=threads,
        output=output,
        device=device,
        dtype=dtype,
        screen=screen,
    )
    if as_json:
        write_json(report)
