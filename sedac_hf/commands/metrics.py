"""`sedac metrics`: what can be asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_hf.cli_options import Base, Device, Dtype, Json, Mode, Quiet, Seed, Uncertified
from sedac_hf.cli_support import Screen, reported, write_json

__all__ = ["metrics"]


@reported
def metrics(
    model: Annotated[str, typer.Argument(help="Artefact or base: a folder or a Hub name.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Prompt; standard input, a prompt a line, if none is given.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts: .jsonl (prompt or text), any other file with a prompt a line."),
    ] = None,
    port: Annotated[
        int, typer.Option(help="Port of /metrics; 0 takes a free one.", min=0, max=65535)
    ] = 9109,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")
    ] = "127.0.0.1",
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on serving after the last answer, until interrupted.")
    ] = False,
    base: Base = None,
    mode: Mode = None,
    uncertified: Uncertified = False,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the chat template out.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 200,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer prompts and meanwhile serve figures for Prometheus: exits, risks, times.

    Prompts come from the command line, from a file, or line by line from standard input, so that a
    program can write one whenever it has one. The figures are at http://HOST:PORT/metrics from the
    moment the model is loaded until the last answer.
    """
    from sedac_hf.cli_metrics import run_metrics

    result = run_metrics(
        model,
        prompt,
        prompts=prompts,
        port=port,
        host=host,
        keep=keep,
        base=base,
        mode=mode,
        uncertified=uncertified,
        raw=raw,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(result)
