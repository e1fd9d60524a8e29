"""What the commands share and what is light: consoles, errors as exit codes, JSON."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from sedac_hf.errors import BaseNotFoundError, ConfigError, ModeError, SedacError

__all__ = [
    "BUNDLED",
    "EXIT_FAILED",
    "EXIT_USAGE",
    "REPOSITORY",
    "Screen",
    "UsageError",
    "check_report_file",
    "default_artefact",
    "parse_duration",
    "reported",
    "write_json",
]

EXIT_FAILED = 1
EXIT_USAGE = 2
REPOSITORY = Path(__file__).resolve().parent.parent
BUNDLED = REPOSITORY / "examples" / "smollm2-135m-instruct-sedac"

P = ParamSpec("P")
R = TypeVar("R")


class UsageError(SedacError):
    """What was asked on the command line cannot be done as it stands."""


# Causes that lie in what was asked, not in how it went.
_USAGE = (UsageError, ConfigError, ModeError, BaseNotFoundError)


class Screen:
    """Where a command writes: results to standard output, everything else to standard error."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """Open both consoles.

        Args:
            quiet: Leave out notes and progress.
            as_json: Standard output is for one JSON object only.
        """
        self.quiet = quiet
        self.as_json = as_json
        self.out = Console(highlight=False, quiet=as_json)
        if not self.out.is_terminal:
            # tables in a file or a pipe need not fit the 80 columns that rich assumes there
            self.out.width = 120
        self.err = Console(stderr=True, highlight=False)

    @property
    def progress(self) -> bool:
        """Whether to show progress bars."""
        return not self.quiet and self.err.is_terminal

    def note(self, text: str) -> None:
        """Write a note for people to standard error."""
        if not self.quiet:
            self.err.print(text, style="dim", markup=False, soft_wrap=True)

    def status(self, text: str) -> Any:
        """Return a context in which `text` stands beside a spinner on a terminal."""
        console = self.err if self.progress else Console(quiet=True)
        return console.status(text)


def write_json(values: Any) -> None:
    """Write one JSON object and a newline to standard output; NaN and infinity become null."""
    json.dump(_finite(values), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors of a command into a message and an exit code, without a traceback.

    The codes are 2 where what was asked cannot be done (unknown mode, no such model) and 1 where it
    went wrong. With `--json` the message is also the object on standard output.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (SedacError, OSError) as error:
            console = Console(stderr=True, highlight=False)
            console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            if kwargs.get("as_json"):
                write_json({"error": {"type": type(error).__name__, "message": str(error)}})
            usage = isinstance(error, _USAGE)
            raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED) from error
        except KeyboardInterrupt as error:
            Console(stderr=True).print("interrupted", style="red")
            raise typer.Exit(130) from error

    return wrapped


def check_report_file(output: Path | None) -> None:
    """Refuse a file for a report that could not be written, before any work is done.

    Args:
        output: The file; None asks for none.

    Raises:
        UsageError: If its folder does not exist.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: its folder does not exist.")


def parse_duration(text: str, option: str) -> float:
    """Read a time such as `90s`, `20m`, `1h30m` or `45` (seconds).

    Args:
        text: What the user wrote.
        option: Where, for the message.

    Returns:
        Seconds, above 0.

    Raises:
        UsageError: If it is not a time above 0.
    """
    found = re.fullmatch(
        r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?",
        text.strip().lower(),
    )
    parts = found.groupdict(default="0") if found else {"h": "0", "m": "0", "s": "0"}
    seconds = 3600 * float(parts["h"]) + 60 * float(parts["m"]) + float(parts["s"])
    if seconds <= 0:
        raise UsageError(f"{option} {text!r} is not a time above 0: write it as 90s, 20m or 1h30m.")
    return seconds


def default_artefact() -> str:
    """The artefact that comes with the repository.

    Raises:
        UsageError: If it is not there, as in an installed wheel.
    """
    if not (BUNDLED / "config.json").is_file():
        raise UsageError(
            f"no model was given, and the bundled one is not at {BUNDLED}: it comes with the "
            "repository, not with the installed package. Name an artefact (a folder or a name on "
            "the Hub), or make one: sedac fit BASE -o OUT."
        )
    return str(BUNDLED)
