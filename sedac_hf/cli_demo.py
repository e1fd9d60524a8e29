"""What `sedac demo` does."""

from __future__ import annotations

from typing import Any

from sedac_hf.cli_load import has_thresholds, let_exits_act, load, seed_everything
from sedac_hf.cli_run import (
    GREEDY,
    Timing,
    encode_prompt,
    exit_legend,
    measure,
    show_report,
    summary,
    write_text,
)
from sedac_hf.cli_support import Screen
from sedac_hf.cli_texts import documents_for
from sedac_hf.generation.exit_governor import exits_always_act

__all__ = ["run_demo"]

DEMO_PROMPTS = (
    "Why does the sky look blue during the day and red at sunset?",
    "Write a Python function that checks whether a string is a palindrome, and explain it.",
)
# The demo's timing takes about this long, on one to three rounds.
_DEMO_TIMING_SECONDS = 40.0
_DEMO_PROMPTS_TIMED = 3
_DEMO_TOKENS_TIMED = 32


def run_demo(
    name: str,
    *,
    base: str | None,
    mode: str | None,
    max_new_tokens: int,
    documents: int,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model, let it write twice, and measure it; see `sedac demo --help`."""
    mode = mode or "certified"  # where exits show
    loaded = load(name, base=base, mode=mode, device=device, dtype=dtype, screen=screen)
    model = loaded.model
    off = model.cascade is None or model.exits_off_reason
    if mode == "certified" and off and has_thresholds(loaded):
        # A demonstration of exits without exits would show nothing.
        screen.out.print(let_exits_act(loaded), style="yellow")
    seed_everything(seed)
    answers = []
    for prompt in DEMO_PROMPTS:
        screen.out.print(f"\n> {prompt}", style="bold", markup=False, soft_wrap=True)
        with exits_always_act():
            result = write_text(
                loaded,
                encode_prompt(loaded, prompt),
                console=None if screen.as_json else screen.out,
                colour=True,
                mode=mode,
                max_new_tokens=max_new_tokens,
                **GREEDY,
            )
        screen.out.print(exit_legend(loaded, result["tokens"]))
        screen.out.print(summary(result), style="dim")
        answers.append({"prompt": prompt, **result})
    texts, origin = documents_for(loaded, None, documents, seed=seed, screen=screen)
    rate = min(answer["tokens_per_second"] for answer in answers)
    one_round = 3 * _DEMO_PROMPTS_TIMED * _DEMO_TOKENS_TIMED / max(rate, 1e-3)
    rounds = min(max(int(_DEMO_TIMING_SECONDS / one_round) - 1, 1), 3)
    timing = Timing(_DEMO_TOKENS_TIMED, rounds, _DEMO_PROMPTS_TIMED)
    screen.out.print()
    report = measure(loaded, texts, origin, timing, mode=mode, seed=seed, screen=screen)
    show_report(report, screen)
    return {"model": name, "answers": answers, "evaluation": report}
