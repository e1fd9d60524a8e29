"""Quality and speed of each strategy at several operating points, all in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from sedac_hf.core.cascade_config import STRATEGIES, CascadeConfig, LayerConfig
from sedac_hf.core.exit_strategy import DEFAULT_STEEPNESS
from sedac_hf.errors import CalibrationError, ModeError
from sedac_hf.evaluation.benchmark import (
    Ratio,
)
from sedac_hf.evaluation.perplexity import generation_prompt, paired_perplexity
from sedac_hf.evaluation.report import plain_values
from sedac_hf.evaluation.rule_speeds import speeds_of_rules
from sedac_hf.evaluation.scoring import length_batches, padded, score_documents

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.evaluation.perplexity import PerplexityResult
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["POINTS", "OperatingPoint", "operating_points", "strategy_curves"]

# Share of the tokens that are sure, steepness, and the confidence that is sure enough: from a half
# on a soft exit skips at least half of the MLPs, from less on the least sure tokens skip little.
POINTS: Final = (
    (0.1, DEFAULT_STEEPNESS, 0.5),
    (0.3, DEFAULT_STEEPNESS, 0.5),
    (0.3, DEFAULT_STEEPNESS, 0.2),
    (0.6, DEFAULT_STEEPNESS, 0.2),
)
# Tokens of one forward that says risks.
_BATCH_TOKENS: Final = 1024


@dataclass(frozen=True)
class OperatingPoint:
    """Rules to measure.

    Attributes:
        name: What it is called.
        cascade: The rules.
        target: Share of the tokens that they were aimed at; None for the model's own rules.
    """

    name: str
    cascade: CascadeConfig
    target: float | None


def operating_points(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    points: Sequence[tuple[float, float, float]] = POINTS,
) -> list[OperatingPoint]:
    """Rules of every strategy under which the same shares of tokens are sure.

    Only the deepest checkpoint acts: it knows most, and the strategies then differ in nothing but
    what they skip. The model's own rules, if it has any, come first.

    Args:
        model: The wrapped model; it has an order of channels.
        documents: Documents that thresholds are aimed with, other than those measured on.
        points: Share of the tokens that are sure, in (0, 1), steepness, and the confidence from
            which a token is sure, in [0, 1). For hard exits each share counts once.

    Returns:
        The points, strategy by strategy.

    Raises:
        CalibrationError: If no decode step is among the documents.
    """
    specs = model.config.checkpoint_specs()
    closed = [LayerConfig(spec.layer_idx, 0.0, exit_confidence=2.0) for spec in specs]
    risks = _risks(model, documents, CascadeConfig(closed, strategy="soft"))[:, -1]
    gate = 0.0 if model.cascade is None else model.cascade.layers[-1].min_probability
    found = []
    if model.cascade is not None and not model.exits_off_reason:
        found.append(OperatingPoint("own rules", model.cascade, None))
    for strategy in STRATEGIES:
        seen = set()
        for target, steepness, enough in points:
            if strategy == "hard" and target in seen:
                continue
            seen.add(target)
            # Confidence is 1 - risk / threshold.
            threshold = float(np.quantile(risks, target)) / (1 - enough) * (1 + 1e-5)
            last = replace(closed[-1], threshold=threshold, decay=0.0, exit_confidence=enough)
            last = replace(last, min_probability=gate)
            rules = CascadeConfig([*closed[:-1], last], strategy=strategy, steepness=steepness)
            name = f"{strategy} {target:.0%}"
            name += "" if strategy == "hard" else f" k={steepness:g} from {enough:g}"
            found.append(OperatingPoint(name, rules, target))
    return found


def strategy_curves(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    points: Sequence[OperatingPoint],
    *,
    speed: bool = True,
    max_new_tokens: int = 64,
    rounds: int = 3,
    max_prompts: int = 4,
    batch_tokens: int | None = None,
    seed: int = 0,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every point: perplexity by the true masked forward, speed by real `generate` calls.

    Args:
        model: The wrapped model; it has an order of channels.
        documents: Documents to measure on; their prompts are those that are timed.
        points: What to measure.
        speed: Also time them, all in turn with the plain loop.
        max_new_tokens: Tokens of each timed call.
        rounds: Timed rounds after a warm-up.
        max_prompts: Most prompts that are timed.
        batch_tokens: Most tokens of one scoring forward; None picks it.
        seed: Seed of the bootstraps.
        told: Is told what comes next.

    Returns:
        Plain values: `points`, each with `strategy`, `target`, `steepness`, `layers` (the rules),
        `exit_share` (soft ones included), `mean_depth`, `mean_kept_share`, `base_ppl`, `ppl`,
        `ppl_increase`, `ppl_increase_ci95` and `speed_vs_plain` (median and 95 % interval of paired
        ratios; None without timing); and what they were obtained with.

    Raises:
        CalibrationError: If there is nothing to score or to time.
        ModeError: If certified mode is refused for this model.
    """
    if (reason := model.refused_modes.get("certified")) is not None:
        raise ModeError(f"Strategies act in certified mode, which is refused: {reason}")
    told("perplexity: the base")
    full = score_documents(model, documents, None, exits="off", batch_tokens=batch_tokens)
    quality = []
    for point in points:
        told(f"perplexity: {point.name}")
        rules = point.cascade
        found = paired_perplexity(
            model, documents, cascade=rules, full=full, batch_tokens=batch_tokens, seed=seed
        )
        quality.append(found)
    ratios: dict[str, Ratio] = {}
    if speed:
        told("speed: plain and all points, taking turns")
        ratios = speeds_of_rules(
            model, {p.name: p.cascade for p in points}, [generation_prompt(d) for d in documents],
            max_new_tokens=max_new_tokens, rounds=rounds, max_prompts=max_prompts, seed=seed,
        )  # fmt: skip
    rows = [
        _row(point, found, ratios.get(point.name))
        for point, found in zip(points, quality, strict=True)
    ]
    timed = {"max_new_tokens": max_new_tokens, "rounds": rounds, "prompts": max_prompts}
    result: dict[str, Any] = plain_values(
        {
            "points": rows,
            "documents": quality[0].documents if quality else 0,
            "tokens": quality[0].tokens if quality else 0,
            "depth": model.shell.num_layers,
            "timing": timed if speed else None,
            "seed": seed,
        }
    )
    return result


def _risks(
    model: SedacForCausalLM, documents: Sequence[Document], closed: CascadeConfig
) -> npt.NDArray[np.float32]:
    """Finite risks at all checkpoints of the documents' decode steps, `[tokens, checkpoints]`."""
    found = []
    with torch.inference_mode(), model.cascade_replaced(closed):
        for group in length_batches(documents, _BATCH_TOKENS):
            some = [documents[i] for i in group]
            ids, mask = padded(some)
            out = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                exits="simulate",
                exit_start=torch.tensor([max(d.prompt_length, 1) for d in some]),
                logits_to_keep=1,
            )
            found.append(out.risks.flatten(0, 1).numpy())
    risks = np.concatenate(found) if found else np.zeros((0, len(closed.layers)), np.float32)
    risks = risks[np.isfinite(risks).all(axis=1)]
    if not len(risks):
        raise CalibrationError(
            "no document has a decode step with finite risks to aim thresholds by; pass documents "
            "that go beyond their prompts."
        )
    return risks


def _row(point: OperatingPoint, found: PerplexityResult, ratio: Ratio | None) -> dict[str, Any]:
    soft = point.cascade.is_soft
    return {
        "name": point.name,
        "strategy": point.cascade.strategy,
        "target": point.target,
        "steepness": point.cascade.steepness if soft else None,
        "layers": [asdict(layer) for layer in point.cascade.layers],
        "exit_share": found.exit_share + found.soft_exit_share,
        "mean_depth": found.mean_depth,
        "mean_kept_share": found.mean_kept_share,
        "base_ppl": found.base_ppl,
        "ppl": found.sedac_ppl,
        "ppl_increase": found.ppl_increase,
        "ppl_increase_ci95": found.ppl_increase_ci95,
        "speed_vs_plain": None if ratio is None else asdict(ratio),
    }
