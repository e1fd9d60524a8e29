"""What `sedac metrics` does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_hf.cli_load import let_exits_act, load, seed_everything
from sedac_hf.cli_run import GREEDY, encode_prompt, summary, write_text
from sedac_hf.cli_support import UsageError
from sedac_hf.cli_texts import read_records
from sedac_hf.metrics import SEDACMetricsCollector, serve_metrics

if TYPE_CHECKING:
    from sedac_hf.cli_support import Screen

__all__ = ["prompts_of", "run_metrics"]


def run_metrics(
    name: str,
    prompt: str | None,
    *,
    prompts: Path | None,
    port: int,
    host: str,
    keep: bool,
    base: str | None,
    mode: str | None,
    uncertified: bool,
    raw: bool,
    max_new_tokens: int,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model, answer prompts and serve its metrics; see `sedac metrics --help`."""
    asked = prompts_of(prompt, prompts)
    loaded = load(name, base=base, mode=mode, device=device, dtype=dtype, screen=screen)
    if uncertified:
        screen.note(let_exits_act(loaded))
        mode = mode or "certified"
    seed_everything(seed)
    collector = SEDACMetricsCollector.for_model(loaded.model)
    answers = []
    with collector.attach(loaded.model), serve_metrics(collector, port, host) as server:
        screen.note(f"metrics: {server.url}")
        for text in asked:
            screen.out.print(f"> {text}", style="bold", markup=False, soft_wrap=True)
            result = write_text(
                loaded,
                encode_prompt(loaded, text, raw=raw),
                console=None if screen.as_json else screen.out,
                colour=False,
                mode=mode,
                max_new_tokens=max_new_tokens,
                **GREEDY,
            )
            del result["tokens"]
            answers.append({"prompt": text, **result})
            screen.note(summary(result))
        if keep:
            _wait(screen, server.url)
        found = collector.snapshot()
        figures = {
            "tokens": sum(found["tokens"]),
            "reports": found["sent"],
            "reports_dropped": found["dropped"],
            "layers": collector.get_layer_analysis(),
        }
        url = server.url
    collector.close()
    return {"model": name, "url": url, "answers": answers, "metrics": figures}


def prompts_of(prompt: str | None, file: Path | None) -> Iterator[str]:
    """The prompts to answer, those of standard input as they come.

    Args:
        prompt: The one prompt; None or `-` for others.
        file: A `.jsonl` with `prompt` or `text`, or any other file with a prompt a line.

    Raises:
        UsageError: If both are given, or there is nothing to answer in what was given.
    """
    if prompt not in (None, "-"):
        if file is not None:
            raise UsageError("give a prompt or --prompts FILE, not both.")
        found = [prompt or ""]
    elif file is None:
        return (line.strip() for line in sys.stdin if line.strip())
    elif not file.is_file():
        raise UsageError(f"--prompts {file}: there is no such file.")
    elif file.suffix == ".jsonl":
        found = [str(one.get("prompt", one.get("text", ""))) for one in read_records(str(file))]
    else:
        found = file.read_text(encoding="utf-8").splitlines()
    texts = [text.strip() for text in found if text.strip()]
    if not texts:
        raise UsageError("there is no prompt in what was given.")
    return iter(texts)


def _wait(screen: Screen, url: str) -> None:
    screen.note(f"all answered; {url} stays until you interrupt (Ctrl-C)")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        screen.note("interrupted: no longer served")
