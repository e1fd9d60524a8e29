"""`sedac fit`: what can be asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_hf.cli_options import Data, Device, Dtype, Json, Quiet, Seed
from sedac_hf.cli_support import EXIT_FAILED, Screen, parse_duration, reported, write_json

__all__ = ["fit"]


@reported
def fit(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artefact.")],
    data: Data = None,
    train_data: Annotated[
        str | None, typer.Option(help="Further texts that only heads are trained on.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for everything: 90s, 20m, 3h.")] = "20m",
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Layers after which tokens may leave, as 11,15,20; -1 is the embedding."),
    ] = None,
    head: Annotated[str, typer.Option(help="block or lens.")] = "block",
    feedback: Annotated[bool, typer.Option(help="Give heads the last final state too.")] = False,
    kv: Annotated[str, typer.Option(help="K/V of exited tokens: settle or propagate.")] = "settle",
    costs: Annotated[
        str, typer.Option(help="What exits cost: measured here, or counted by parameters.")
    ] = "measured",
    epsilon: Annotated[float, typer.Option(help="Rise of perplexity to certify.")] = 0.01,
    delta: Annotated[float, typer.Option(help="Chance that the certificate is wrong.")] = 0.1,
    tokens: Annotated[
        int, typer.Option(help="Most tokens that the base writes.", min=1)
    ] = 1_000_000,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit exits to a base: texts, heads, probes, thresholds, certificate, card.

    An interrupted run goes on where it was when called again. The exit code is 1 when nothing could
    be certified; the artefact is written all the same, with exits off in certified mode.
    """
    from sedac_hf.cli_fit import run_fit

    result = run_fit(
        base,
        output,
        data=data,
        train_data=train_data,
        budget_seconds=parse_duration(budget, "--budget"),
        checkpoints=checkpoints,
        head=head,
        feedback=feedback,
        kv_mode=kv,
        costs=costs,
        epsilon=epsilon,
        delta=delta,
        text_tokens=tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(result)
    if not result["certified"]:
        raise typer.Exit(EXIT_FAILED)
