"""`sedac demo`: what can be asked of it."""

from __future__ import annotations

from typing import Annotated

import typer

from sedac_hf.cli_options import Base, Device, Dtype, Json, Mode, Model, Quiet, Seed
from sedac_hf.cli_support import Screen, default_artefact, reported, write_json

__all__ = ["demo"]


@reported
def demo(
    model: Model = None,
    base: Base = None,
    mode: Mode = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 96,
    documents: Annotated[int, typer.Option(help="Documents for the perplexity.", min=2)] = 16,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write an answer and a piece of Python, coloured by depth, then print the figures.

    Without MODEL it runs on the artefact that comes with the repository. Thresholds that no
    certificate covers act here all the same, and the demo says so.
    """
    from sedac_hf.cli_demo import run_demo

    result = run_demo(
        model or default_artefact(),
        base=base,
        mode=mode,
        max_new_tokens=max_new_tokens,
        documents=documents,
        seed=seed,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(result)
