"""`sedac test`: what can be asked of it."""

from __future__ import annotations

from typing import Annotated

import typer

from sedac_hf.cli_options import (
    Base,
    Device,
    Documents,
    Dtype,
    Json,
    Mode,
    Model,
    Quiet,
    ReportFile,
    Seed,
    TimedPrompts,
    TimedRounds,
    TimedTokens,
    Uncertified,
)
from sedac_hf.cli_support import EXIT_FAILED, Screen, default_artefact, reported, write_json

__all__ = ["suite"]


@reported
def suite(
    model: Model = None,
    base: Base = None,
    mode: Mode = None,
    uncertified: Uncertified = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts, as for eval; given several times, each is a domain of its own. Without it "
            "the base writes them."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Tests to run, as quality,robustness,performance,distribution_shift; all if not "
            "given."
        ),
    ] = None,
    documents: Documents = 64,
    ppl_tolerance: Annotated[
        float, typer.Option(help="Rise of perplexity to stay below (0.01 = 1 %).")
    ] = 0.01,
    slo_ms: Annotated[
        float, typer.Option(help="Milliseconds that p50, p95 and p99 per token stay below.")
    ] = 100.0,
    min_consistency: Annotated[
        float, typer.Option(help="Share of decisions and tokens that noise must not change.")
    ] = 0.9,
    max_variance: Annotated[
        float, typer.Option(help="Variance between domains to stay below.")
    ] = 0.2,
    max_new_tokens: TimedTokens = 64,
    rounds: TimedRounds = 3,
    prompts: TimedPrompts = 8,
    output: ReportFile = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Test quality, robustness, latency and shift of domains on your own texts.

    Perplexity with exits against the base's, noise on hidden states, milliseconds per token of real
    generate() calls, and exits by domain: with fewer than two of your own, the chat, code and
    grounded prompts of the package are added. Certified mode is tested unless --mode names another.
    The exit code is 1 when a test fails. Without MODEL it tests the artefact of the repository.
    """
    from sedac_hf.cli_suite import run_suite
    from sedac_hf.testing import TestConfig

    report = run_suite(
        model or default_artefact(),
        TestConfig(
            ppl_tolerance=ppl_tolerance,
            latency_slo_ms=slo_ms,
            min_consistency=min_consistency,
            max_variance=max_variance,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            prompts=prompts,
            mode=mode,
            seed=seed,
        ),
        base=base,
        uncertified=uncertified,
        data=data or [],
        only=only,
        documents=documents,
        output=output,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(report)
    if not report["passed"]:
        raise typer.Exit(EXIT_FAILED)
