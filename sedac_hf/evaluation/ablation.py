"""What each part of the gates is worth: every variant measured in one run, beside plain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sedac_hf.calibration.pareto import Policy
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.benchmark import Ratio
from sedac_hf.evaluation.perplexity import PerplexityResult, compared
from sedac_hf.evaluation.rule_speeds import speeds_of_rules
from sedac_hf.evaluation.settled_scoring import score_policies

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["AblationRow", "FittedVariant", "fitted_variants", "measure_ablation"]


@dataclass(frozen=True)
class FittedVariant:
    """A variant of the gates as `fit` left it.

    Attributes:
        name: What it is called.
        chosen: Whether `fit` found that it pays best.
        cascade: Its rules at the target; None where nothing leaves within it.
    """

    name: str
    chosen: bool
    cascade: CascadeConfig | None


@dataclass(frozen=True)
class AblationRow:
    """What one variant does.

    Attributes:
        name: The variant.
        chosen: Whether `fit` found that it pays best.
        exit_share: Share of the decode steps that left early.
        mean_depth: Mean number of layers that a decode step ran.
        ppl_increase: Rise of perplexity over full depth, as a fraction.
        ppl_increase_ci95: 95 % interval of it.
        speed_vs_plain: Speed against our own loop without exits; None where it was not timed.
    """

    name: str
    chosen: bool
    exit_share: float
    mean_depth: float
    ppl_increase: float | None
    ppl_increase_ci95: tuple[float | None, float | None]
    speed_vs_plain: Ratio | None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return asdict(self)


def fitted_variants(model: SedacForCausalLM) -> list[FittedVariant]:
    """The variants that the artefact's fit has left.

    Args:
        model: A model that was loaded from an artefact.

    Raises:
        CalibrationError: If there are none.
    """
    card: Mapping[str, Any] = model.origin.card if model.origin is not None else {}
    rows = ((card.get("results") or {}).get("fit") or {}).get("ablation") or []
    if not rows:
        raise CalibrationError(
            "the artefact says nothing of variants of its gates: it was fitted by an earlier "
            "sedac_hf, or not by fit. Fit it anew with `sedac fit`."
        )
    return [
        FittedVariant(
            row["name"],
            bool(row["chosen"]),
            Policy.from_dict(row["policy"]).cascade if row["policy"] else None,
        )
        for row in rows
    ]


def measure_ablation(
    model: SedacForCausalLM,
    variants: Sequence[FittedVariant],
    documents: Sequence[Document],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
    rounds: int = 5,
    max_prompts: int = 8,
    seed: int = 0,
) -> list[AblationRow]:
    """Measure all variants on the same documents, and their speed taking turns.

    Args:
        model: The wrapped model.
        variants: What to measure.
        documents: Documents that fit did not see.
        prompts: Token ids to time generation on; None leaves speed out.
        max_new_tokens: Tokens of each timed call.
        rounds: Timed rounds after a warm-up.
        max_prompts: Most prompts.
        seed: Seed of the bootstraps.

    Returns:
        One row a variant.
    """
    cascades = [variant.cascade for variant in variants]
    full, *scores = score_policies(model, documents, [None, *cascades])
    speeds: dict[str, Ratio] = {}
    if prompts is not None:
        speeds = speeds_of_rules(
            model, {v.name: v.cascade for v in variants if v.cascade is not None}, prompts,
            max_new_tokens=max_new_tokens, rounds=rounds, max_prompts=max_prompts, seed=seed,
        )  # fmt: skip
    rows = []
    for variant, exited in zip(variants, scores, strict=True):
        quality = compared(model, documents, full, exited, seed=seed)
        rows.append(_row(variant, quality, speeds.get(variant.name)))
    return rows


def _row(variant: FittedVariant, quality: PerplexityResult, speed: Ratio | None) -> AblationRow:
    low, high = (_finite(end) for end in quality.ppl_increase_ci95)
    return AblationRow(
        name=variant.name,
        chosen=variant.chosen,
        exit_share=quality.exit_share,
        mean_depth=quality.mean_depth,
        ppl_increase=_finite(quality.ppl_increase),
        ppl_increase_ci95=(low, high),
        speed_vs_plain=speed,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
