"""The `sedac` command. Nothing heavy is imported before a command runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from sedac_hf import __version__
from sedac_hf.commands.bench import bench
from sedac_hf.commands.demo import demo
from sedac_hf.commands.evaluate import evaluate
from sedac_hf.commands.fit import fit
from sedac_hf.commands.generate import generate
from sedac_hf.commands.info import info
from sedac_hf.commands.metrics import metrics
from sedac_hf.commands.suite import suite

__all__ = ["app", "main"]

EPILOG = (
    "Exit codes: 0 it worked, 1 it failed or missed its target (a certificate, a limit on "
    "perplexity, a test), 2 what was asked cannot be done."
)

# In the order of the help: name, what runs, an example.
COMMANDS = (
    ("demo", demo, "sedac demo"),
    ("fit", fit, "sedac fit .models/smollm2-135m-instruct -o my-sedac --budget 20m"),
    ("eval", evaluate, "sedac eval my-sedac --data texts.jsonl --json > result.json"),
    ("bench", bench, "sedac bench my-sedac --modes exact,plain --batches 1"),
    ("test", suite, "sedac test my-sedac --data mails.jsonl --data code.jsonl --slo-ms 50"),
    ("generate", generate, 'sedac generate my-sedac "Why is the sky blue?" --trace'),
    ("metrics", metrics, "sedac metrics my-sedac --prompts prompts.txt --port 9109"),
    ("info", info, "sedac info my-sedac"),
)

app = typer.Typer(
    name="sedac",
    help="Early exit for Hugging Face language models, with certified perplexity.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"sedac_hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


for _name, _command, _example in COMMANDS:
    app.command(_name, epilog=f"Example: {_example}")(_command)


def main() -> None:
    """Run the command line."""
    app()
