"""The `sedac` command. Nothing heavy is imported before a command runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac_hf import __version__
from sedac_hf.cli_options import (
    Base,
    Data,
    Device,
    Dtype,
    Json,
    Mode,
    Model,
    Quiet,
    Seed,
    Uncertified,
)
from sedac_hf.cli_support import (
    EXIT_FAILED,
    Screen,
    default_artefact,
    parse_duration,
    reported,
    write_json,
)

__all__ = ["app", "main"]

EPILOG = (
    "Exit codes: 0 it worked, 1 it failed or missed its target (a certificate, a limit on "
    "perplexity), 2 what was asked cannot be done."
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


@app.command(epilog="Example: sedac demo")
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


@app.command(epilog="Example: sedac fit .models/smollm2-135m-instruct -o my-sedac --budget 20m")
@reported
def fit(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artefact.")],
    data: Data = None,
    train_data: Annotated[
        str | None, typer.Option(help="Further texts that only heads are trained on.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for everything: 90s, 20m, 3h.")] = "20m",
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Layers after which tokens may leave, as 11,15,20; -1 is the embedding."),
    ] = None,
    head: Annotated[str, typer.Option(help="block or lens.")] = "block",
    feedback: Annotated[bool, typer.Option(help="Give heads the last final state too.")] = False,
    kv: Annotated[str, typer.Option(help="K/V of exited tokens: settle or propagate.")] = "settle",
    costs: Annotated[
        str, typer.Option(help="What exits cost: measured here, or counted by parameters.")
    ] = "measured",
    epsilon: Annotated[float, typer.Option(help="Rise of perplexity to certify.")] = 0.01,
    delta: Annotated[float, typer.Option(help="Chance that the certificate is wrong.")] = 0.1,
    tokens: Annotated[int, typer.Option(help="Most tokens that the base writes.")] = 1_000_000,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit exits to a base: texts, heads, probes, thresholds, certificate, card.

    An interrupted run goes on where it was when called again. The exit code is 1 when nothing could
    be certified; the artefact is written all the same, with exits off in certified mode.
    """
    from sedac_hf.cli_fit import run_fit

    result = run_fit(
        base,
        output,
        data=data,
        train_data=train_data,
        budget_seconds=parse_duration(budget),
        checkpoints=checkpoints,
        head=head,
        feedback=feedback,
        kv_mode=kv,
        costs=costs,
        epsilon=epsilon,
        delta=delta,
        text_tokens=tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(result)
    if not result["certified"]:
        raise typer.Exit(EXIT_FAILED)


@app.command("eval", epilog="Example: sedac eval my-sedac --data texts.jsonl --json > result.json")
@reported
def evaluate(
    model: Model = None,
    base: Base = None,
    mode: Mode = None,
    uncertified: Uncertified = False,
    data: Data = None,
    documents: Annotated[int, typer.Option(help="Most documents.", min=2)] = 64,
    speed: Annotated[bool, typer.Option(help="Measure speed too.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each timed call.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds after a warm-up.", min=1)] = 5,
    prompts: Annotated[int, typer.Option(help="Most prompts that are timed.", min=1)] = 8,
    max_increase: Annotated[
        float | None,
        typer.Option(help="Exit with code 1 if perplexity rises by more (0.01 = 1 %)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the whole report.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print perplexity, exits and speed beside those of the base, in one table.

    Perplexity is that of the model that generates: every token after a prompt follows the exit
    rule. Speed is that of real generate() calls at batch 1, against base.generate() and against our
    own loop without exits. Without MODEL it measures the artefact of the repository.
    """
    from sedac_hf.cli_run import run_evaluation

    report = run_evaluation(
        model or default_artefact(),
        base=base,
        mode=mode,
        uncertified=uncertified,
        data=data,
        documents=documents,
        speed=speed,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        prompts=prompts,
        output=output,
        seed=seed,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(report)
    rise = report["ppl_increase"]
    if max_increase is not None and (rise is None or rise > max_increase):
        Screen().err.print(f"perplexity rises by more than {max_increase:.2%}", style="red")
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Example: sedac bench my-sedac --modes exact,plain --batches 1")
@reported
def bench(
    model: Model = None,
    base: Base = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few prompts, short texts: within ten minutes.")
    ] = False,
    groups: Annotated[
        str | None, typer.Option(help="Prompt groups, as chat,code,grounded.")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes, as 1,4,8.")] = None,
    modes: Annotated[str | None, typer.Option(help="Modes, as exact,certified,plain,off.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of each call.", min=1)] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts of a group.", min=1)] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds that count.", min=1)] = None,
    uncertified: Uncertified = False,
    gguf: Annotated[
        Path | None,
        typer.Option(help="The same weights as a GGUF file: a row for llama.cpp."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.", min=1)] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that results are kept in.")
    ] = Path("benchmarks/results"),
    passes: Annotated[
        bool,
        typer.Option("--pass", help="Time passes of 1 to 16 tokens instead: native beside torch."),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print how fast each mode writes, as ratios, and whether the tokens are the base's.

    Modes take turns with base.generate(), with our own loop without exits (plain) and, at batch 1,
    with assistant_early_exit and prompt_lookup_num_tokens. What the loop gains and what exits gain
    are two columns. Without MODEL it measures the artefact of the repository.

    With --pass it times single passes of the base at contexts of 128, 1,024 and 8,192, and says
    what share of the memory's measured bandwidth they reach; --base, --threads, --repeats, --device
    and --dtype apply.
    """
    from sedac_hf.cli_bench import plan_of, run_benchmark, run_passes

    if passes:
        others = (quick, groups, batches, modes, tokens, prompts, uncertified, gguf)
        screen = Screen(quiet=quiet, as_json=as_json)
        timed = run_passes(
            model or default_artefact(),
            with_others=any(others),
            base=base,
            rounds=repeats,
            threads=threads,
            device=device,
            dtype=dtype,
            screen=screen,
        )
        if as_json:
            write_json(timed)
        return
    plan = plan_of(
        quick=quick,
        groups=groups,
        batches=batches,
        modes=modes,
        tokens=tokens,
        prompts=prompts,
        repeats=repeats,
        seed=seed,
    )
    report = run_benchmark(
        model or default_artefact(),
        plan,
        base=base,
        uncertified=uncertified,
        gguf=gguf,
        threads=threads,
        output=output,
        device=device,
        dtype=dtype,
        screen=Screen(quiet=quiet, as_json=as_json),
    )
    if as_json:
        write_json(report)


@app.command(epilog='Example: sedac generate my-sedac "Why is the sky blue?" --trace')
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


@app.command(epilog="Example: sedac info my-sedac")
@reported
def info(model: Model = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Print versions and device, or what an artefact holds, certifies, and runs on here."""
    from sedac_hf.cli_info import artefact_info, environment_info
    from sedac_hf.cli_tables import info_table

    screen = Screen(quiet=quiet, as_json=as_json)
    values = environment_info() if model is None else artefact_info(model, screen)
    if as_json:
        write_json(values)
    else:
        screen.out.print(info_table(values))


def main() -> None:
    """Run the command line."""
    app()
