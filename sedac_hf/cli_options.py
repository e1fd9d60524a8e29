"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Base",
    "Data",
    "Device",
    "Documents",
    "Dtype",
    "Json",
    "Mode",
    "Model",
    "Quiet",
    "ReportFile",
    "Seed",
    "TimedPrompts",
    "TimedRounds",
    "TimedTokens",
    "Uncertified",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.", min=0)]
Device = Annotated[str, typer.Option(help="torch device; auto takes a GPU if there is one.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto takes the fastest certified.")
]
Base = Annotated[
    str | None, typer.Option(help="Folder or name of the base, if not where the artefact says.")
]
Model = Annotated[
    str | None,
    typer.Argument(
        help="Artefact, or plain base: a folder or a name on the Hub.", show_default=False
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(help="off, plain, certified or exact; the artefact's own if not given."),
]
Uncertified = Annotated[
    bool,
    typer.Option("--uncertified", help="Let exits act on thresholds that no certificate covers."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Texts: .jsonl (text; prompt and completion; messages), any other file with texts set "
        "apart by blank lines, or a data set (name or name:split). Without it the base writes them."
    ),
]
Documents = Annotated[int, typer.Option(help="Most documents.", min=2)]
TimedTokens = Annotated[int, typer.Option(help="Tokens of each timed call.", min=1)]
TimedRounds = Annotated[int, typer.Option(help="Timed rounds after a warm-up.", min=1)]
TimedPrompts = Annotated[int, typer.Option(help="Most prompts that are timed.", min=1)]
ReportFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="File for the whole report.")
]
