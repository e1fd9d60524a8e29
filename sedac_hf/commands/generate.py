"""`sedac generate`: what can be asked of it."""

from __future__ import annotations

from typing import Annotated

import typer

from sedac_hf.cli_options import Base, Device, Dtype, Json, Mode, Quiet, Seed, Uncertified
from sedac_hf.cli_support import Screen, reported, write_json

__all__ = ["generate"]


@reported
def generate(
    model: Annotated[str, typer.Argument(help="Artefact or base: a folder or a Hub name.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Prompt; standard input if not given.", show_default=False)
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Colour the text by exit depth.")] = False,
    base: Base = None,
    mode: Mode = None,
    uncertified: Uncertified = False,
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the chat template out.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="With a temperature.", min=0.0, max=1.0)] = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write text with early exits, streaming; --trace colours each token by its depth."""
    from sedac_hf.cli_run import run_generate

    result = run_generate(
        model,
        prompt,
        trace=trace,
        base=base,
        mode=mode,
        uncertified=uncertified,
        system=system,
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(result)
