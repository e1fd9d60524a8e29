"""What `sedac fit` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.cli_load import load_base_model, seed_everything
from sedac_hf.cli_support import Screen, UsageError
from sedac_hf.cli_tables import fit_table, info_table
from sedac_hf.cli_texts import read_texts
from sedac_hf.config import KV_MODES, CheckpointSpec
from sedac_hf.errors import CalibrationError

__all__ = ["parse_checkpoints", "run_fit"]


def parse_checkpoints(text: str, *, head: str, feedback: bool) -> tuple[CheckpointSpec, ...]:
    """Read layers such as `11,15,20` into checkpoints.

    Args:
        text: Layers, set apart by commas; -1 is the embedding.
        head: `block` or `lens`.
        feedback: Whether block heads get the last final state too.

    Raises:
        UsageError: If a layer is no whole number, or stands there twice.
        ConfigError: If no head can be built like that.
    """
    try:
        layers = sorted(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--checkpoints {text!r}: expected whole numbers with commas between them, as 11,15,20."
        ) from error
    if len(set(layers)) < len(layers):
        raise UsageError(f"--checkpoints {text}: a layer stands there twice.")
    return tuple(CheckpointSpec(layer, head=head, feedback=feedback) for layer in layers)


def run_fit(
    base: str,
    output: Path,
    *,
    data: str | None,
    train_data: str | None,
    budget_seconds: float,
    checkpoints: str | None,
    head: str,
    feedback: bool,
    kv_mode: str,
    costs: str,
    epsilon: float,
    delta: float,
    text_tokens: int,
    seed: int,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a base and fit exits to it; see `sedac fit --help`."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder.")
    if not epsilon > 0 or not 0 < delta < 1:
        raise UsageError(
            f"--epsilon must be above 0, and --delta between 0 and 1; found {epsilon} and {delta}."
        )
    try:
        RiskTarget(epsilon=epsilon, delta=delta)
    except CalibrationError as error:
        raise UsageError(f"--epsilon {epsilon} cannot be certified: {error}") from error
    if kv_mode not in KV_MODES:
        raise UsageError(f"--kv {kv_mode}: it must be one of {', '.join(KV_MODES)}.")
    if costs not in ("measured", "parameters"):
        raise UsageError(f"--costs {costs}: it must be measured or parameters.")
    specs = None
    if checkpoints is not None:
        specs = parse_checkpoints(checkpoints, head=head, feedback=feedback)
    elif head != "block" or feedback:
        raise UsageError("--head and --feedback are about --checkpoints: name these too.")
    with screen.status(f"loading {base}"):
        model, tokenizer, reason = load_base_model(base, device=device, dtype=dtype, screen=screen)
        from sedac_hf.calibration.fit_settings import FitSettings
        from sedac_hf.calibration.fitting import fit
    chosen = str(model.dtype).removeprefix("torch.")
    screen.note(f"fitting in {chosen} ({reason}), at most {budget_seconds / 60:.0f} minutes")
    seed_everything(seed)
    texts = None if data is None else read_texts(data, tokenizer)
    more = None
    if train_data is not None:
        more = read_texts(train_data, tokenizer, option="--train-data")
    fitted, report = fit(
        model,
        texts,
        tokenizer=tokenizer,
        train_texts=more,
        output_dir=output,
        settings=FitSettings(
            checkpoints=specs,
            kv_mode=kv_mode,
            costs=costs,
            budget_seconds=budget_seconds,
            text_tokens=text_tokens,
            epsilon=epsilon,
            delta=delta,
            seed=seed,
        ),
        progress=not screen.quiet,
    )
    values = report.to_dict()
    certified = fitted.cascade is not None
    if not screen.as_json:
        screen.out.print(fit_table(values))
        screen.out.print(info_table(_outcome(values, output)))
    return {"output": str(output), "dtype": chosen, "certified": certified, "report": values}


def _outcome(report: dict[str, Any], output: Path) -> dict[str, Any]:
    certificate = report.get("certificate") or {}
    return {
        "documents": report["documents"],
        "tokens": f"{report['tokens']:,}",
        "seconds": {stage: round(spent) for stage, spent in report["seconds"].items()},
        "certificate": certificate.get(
            "statement", "none: no policy saves time within the bound, so exits stay off"
        ),
        "artefact": f"{output}  (try: sedac generate {output} PROMPT --trace)",
    }
