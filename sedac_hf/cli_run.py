"""What `sedac generate` and `sedac eval` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sedac_hf.cli_load import (
    Loaded,
    conditions_line,
    let_exits_act,
    load,
    seed_everything,
)
from sedac_hf.cli_support import Screen, UsageError, check_report_file
from sedac_hf.cli_tables import evaluation_table
from sedac_hf.cli_texts import documents_for
from sedac_hf.cli_trace import TraceStreamer, legend
from sedac_hf.evaluation import prompts as prompt_files
from sedac_hf.evaluation.benchmark import SpeedResult, benchmark
from sedac_hf.evaluation.perplexity import exits_act, paired_perplexity
from sedac_hf.evaluation.report import build_report, save_report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sedac_hf.calibration.documents import Document

__all__ = [
    "GREEDY",
    "Timing",
    "encode_prompt",
    "exit_legend",
    "measure",
    "run_evaluation",
    "run_generate",
    "show_report",
    "summary",
    "write_text",
]

# Settings of sampling that a model brings along would only make greedy search warn.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Timing:
    """How speed is measured.

    Attributes:
        max_new_tokens: Tokens of each timed call.
        rounds: Timed rounds after a warm-up.
        prompts: Most prompts.
    """

    max_new_tokens: int
    rounds: int
    prompts: int


def run_generate(
    name: str,
    prompt: str | None,
    *,
    trace: bool,
    base: str | None,
    mode: str | None,
    uncertified: bool,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model and let it write; see `sedac generate --help`."""
    text = _prompt_text(prompt)
    loaded = load(name, base=base, mode=mode, device=device, dtype=dtype, screen=screen)
    if uncertified:
        screen.note(let_exits_act(loaded))
        mode = mode or "certified"
    seed_everything(seed)
    inputs = encode_prompt(loaded, text, system=system, raw=raw)
    sampling: dict[str, Any] = dict(GREEDY)
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    result = write_text(
        loaded,
        inputs,
        console=None if screen.as_json else screen.out,
        colour=trace,
        mode=mode,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    tokens = result.pop("tokens")
    if trace:
        result["tokens"] = tokens
        if not screen.as_json:
            screen.out.print(exit_legend(loaded, tokens))
    screen.note(f"{summary(result)}; {conditions_line(loaded)}")
    return {"model": name, "prompt": text, **result, "dtype": loaded.dtype}


def _prompt_text(prompt: str | None) -> str:
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise UsageError("no prompt: give it as an argument, or on standard input.")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UsageError("the prompt is empty.")
    return prompt


def encode_prompt(
    loaded: Loaded, text: str, *, system: str | None = None, raw: bool = False
) -> dict[str, torch.Tensor]:
    """Token ids `[1, length]` and attention mask of a prompt, as a chat where the model knows one.

    Args:
        loaded: The model.
        text: The prompt.
        system: System message of the chat.
        raw: Leave the chat template out.

    Raises:
        UsageError: If a system message is given and there is no chat, or no token comes out.
    """
    if system and (raw or not loaded.tokenizer.chat_template):
        raise UsageError("--system needs a chat template, and this model is asked without one.")
    found = prompt_files.encode_prompt(loaded.tokenizer, text, system=system, raw=raw)
    ids = torch.tensor([found], dtype=torch.long, device=loaded.model.device)
    if ids.shape[1] == 0:
        raise UsageError("the prompt gives no tokens.")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_text(
    loaded: Loaded,
    inputs: Mapping[str, torch.Tensor],
    *,
    console: Console | None,
    colour: bool,
    mode: str | None,
    **settings: Any,
) -> dict[str, Any]:
    """Generate once, streaming, and say what was written and how.

    Args:
        loaded: The model.
        inputs: Token ids `[1, length]` and attention mask.
        console: Where to stream the text; None writes nothing.
        colour: Whether to colour by depth.
        mode: SEDAC mode; None for the model's own.
        **settings: For `generate`.

    Returns:
        Text, tokens with their layers, counts, seconds, tokens per second, and exit figures.
    """
    model = loaded.model
    streamer = TraceStreamer(model, loaded.tokenizer, console, colour=colour)
    if getattr(model.generation_config, "pad_token_id", None) is None:
        settings.setdefault("pad_token_id", 0)
    began = time.perf_counter()
    model.generate(**inputs, streamer=streamer, sedac_mode=mode, **settings)
    seconds = time.perf_counter() - began
    depth = model.exit_stats.depth
    layers = streamer.layers
    checkpoints = [spec.layer_idx for spec in model.config.checkpoint_specs()]
    count = len(layers)
    return {
        "mode": mode or model.config.mode,
        "text": streamer.text,
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "new_tokens": count,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "depth": depth,
        "mean_depth": sum(min(layer + 1, depth) for layer in layers) / count if count else depth,
        "exit_share": sum(layer < depth for layer in layers) / count if count else 0.0,
        "exits_by_layer": {layer: layers.count(layer) for layer in checkpoints},
        "tokens": [token.to_dict() for token in streamer.tokens],
    }


def exit_legend(loaded: Loaded, tokens: Sequence[Mapping[str, Any]]) -> Text:
    """The line that explains the colours of some tokens and counts them."""
    checkpoints = [spec.layer_idx for spec in loaded.model.config.checkpoint_specs()]
    depth = loaded.model.exit_stats.depth
    layers, drafts = [t["layer"] for t in tokens], [t["draft"] for t in tokens]
    return legend(layers, checkpoints, depth, drafts)


def summary(result: Mapping[str, Any]) -> str:
    """Length, speed and depth of a text in one line."""
    return (
        f"{result['new_tokens']} tokens at {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['exit_share']:.1%} left early, mean depth {result['mean_depth']:.1f} of "
        f"{result['depth']} layers"
    )


def run_evaluation(
    name: str,
    *,
    base: str | None,
    mode: str | None,
    uncertified: bool,
    data: str | None,
    documents: int,
    speed: bool,
    max_new_tokens: int,
    rounds: int,
    prompts: int,
    output: Path | None,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model and measure it; see `sedac eval --help`."""
    check_report_file(output)
    loaded = load(name, base=base, mode=mode, device=device, dtype=dtype, screen=screen)
    if uncertified:
        screen.note(let_exits_act(loaded))
    if mode is None and "certified" not in loaded.model.refused_modes:
        mode = "certified"  # in exact mode there is no perplexity to measure
    seed_everything(seed)
    texts, origin = documents_for(loaded, data, documents, seed=seed, screen=screen)
    timing = Timing(max_new_tokens, rounds, prompts) if speed else None
    report = measure(loaded, texts, origin, timing, mode=mode, seed=seed, screen=screen)
    if output is not None:
        save_report(report, output)
        screen.note(f"report written to {output}")
    show_report(report, screen)
    return report


def measure(
    loaded: Loaded,
    documents: Sequence[Document],
    origin: str,
    timing: Timing | None,
    *,
    mode: str | None,
    seed: int,
    screen: Screen,
) -> dict[str, Any]:
    """Perplexity and speed of a model.

    Args:
        loaded: The model.
        documents: Documents for the perplexity; the prompts for timing are theirs.
        origin: Where the documents are from, in words.
        timing: How to time; None leaves speed out.
        mode: SEDAC mode; None for the model's own.
        seed: Seed of the bootstraps.
        screen: For progress.

    Returns:
        The report as plain JSON values.

    Raises:
        UsageError: If the model has no exits to measure.
    """
    model = loaded.model
    if not model.config.checkpoints:
        raise UsageError(
            f"{loaded.name} is a plain base without exits, so there is nothing to compare. Fit "
            f"some: sedac fit {loaded.name} -o OUT."
        )
    mode = mode or model.config.mode
    exits = exits_act(model, mode)
    if mode == "certified" and not exits:
        reason = model.exits_off_reason or "no policy is certified for this model."
        screen.note(f"exits stay off in certified mode: {reason}")
    with screen.status(f"perplexity of {len(documents)} documents, with and without exits"):
        quality = paired_perplexity(model, documents, exits=exits, seed=seed)
    speed: SpeedResult | None = None
    if timing is not None:
        prompts = [d.ids[: max(1, d.prompt_length)].tolist() for d in documents]
        with screen.status("speed of base.generate(), plain and SEDAC, taking turns"):
            speed = benchmark(
                model,
                prompts,
                mode=mode,
                max_new_tokens=timing.max_new_tokens,
                rounds=timing.rounds,
                max_prompts=timing.prompts,
                seed=seed,
            )
    report = build_report(model, mode, quality, speed)
    # Exits are certified when their thresholds are those of the certificate.
    policy = model.certificate.policy if model.certificate else None
    certified = exits and policy is not None and policy.cascade == model.cascade
    return {
        **report,
        "certified": certified,
        "texts": origin,
        "conditions": conditions_line(loaded),
    }


def show_report(report: Mapping[str, Any], screen: Screen) -> None:
    """Print a report as a table, with its conditions and its certificate below."""
    screen.out.print(evaluation_table(report))
    speed = report.get("speed")
    timed = ""
    if speed:
        timed = (
            f"; speed: {len(speed['prompt_lengths'])} prompts x {speed['max_new_tokens']} tokens, "
            f"rounds: {speed['rounds']}, greedy, medians of paired ratios with 95 % intervals"
        )
    screen.out.print(
        f"Conditions: {report['conditions']}; {report['texts']}{timed}. plain: our own loop "
        "without exits.",
        style="dim",
    )
    certificate = report.get("certificate")
    if certificate and certificate.get("statement"):
        screen.out.print(f"Certificate: {certificate['statement']}", style="dim")
