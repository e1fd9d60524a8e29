"""Do exits and quality hold up when the texts are of another kind?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.intervals import ratio_standard_error
from sedac_hf.testing.outcome import TestOutcome

if TYPE_CHECKING:
    from sedac_hf.testing.suite_input import SuiteInput

__all__ = ["DistributionShiftTest", "Domain", "ShiftOutcome", "between_variance"]


@dataclass(frozen=True)
class Domain:
    """Exits and quality on the texts of one domain.

    Attributes:
        name: The domain.
        documents: Documents that were scored.
        tokens: Tokens that were scored.
        exit_rate: Share of the decode steps that left early.
        exit_rate_error: Its standard error over documents.
        ppl_increase: Rise of perplexity over all tokens of the domain.
        log_rise: The same as a mean rise of the NLL per token, nats.
        log_rise_error: Its standard error over documents.
    """

    name: str
    documents: int
    tokens: int
    exit_rate: float
    exit_rate_error: float
    ppl_increase: float
    log_rise: float
    log_rise_error: float


@dataclass(frozen=True, kw_only=True)
class ShiftOutcome(TestOutcome):
    """How much domains differ.

    Attributes:
        domains: What was found in each domain.
        exit_variance: Variance between domains of their exit rates, each divided by the mean rate.
        quality_variance: Variance between domains of their rises of the NLL, each divided by that
            which raises perplexity by `ppl_tolerance`.
        raw_exit_variance: Sample variance of the exit rates as they are.
    """

    domains: tuple[Domain, ...]
    exit_variance: float
    quality_variance: float
    raw_exit_variance: float

    def details(self) -> list[tuple[str, str]]:
        """One line for each domain."""
        return [
            (
                f"{one.name} ({one.documents} documents)",
                f"{one.exit_rate:.1%} leave early, perplexity {one.ppl_increase:+.2%}",
            )
            for one in self.domains
        ]


class DistributionShiftTest:
    """Exit rates and quality differ between domains with a normalised variance below 0.2.

    The domains are the user's, and the prompt groups of the package (chat, code, grounded) with
    the baseline's own answers where the user's texts are of fewer than two. For each domain d:

    * `r_d`, the exit rate: decode steps that left early over all decode steps;
    * `q_d`, the rise of the NLL per token over `log(1 + ppl_tolerance)`: 1 is a rise of perplexity
      by just the tolerance.

    Two statistics, each a `between_variance` of K domains: that of `r_d / mean(r)`, and that of
    `q_d`. Both are free of units and 0 where all domains are alike. The test passes if the larger
    one is below `max_variance`; 0.2 is a standard deviation of 45 % of the mean exit rate, or of
    0.45 tolerances. Differences that the choice of documents explains do not count.

    Skipped where exits are not final.
    """

    name = "distribution_shift"

    def run(self, given: SuiteInput) -> TestOutcome:
        """Measure.

        Args:
            given: Models, texts and limits.
        """
        limit = given.config.max_variance
        criterion = f"variance of exit rates and quality between domains is below {limit:g}"
        if not given.exits_act:
            return TestOutcome(
                name=self.name, passed=None, criterion=criterion, found=given.why_no_exits
            )
        domains = tuple(
            _domain(name, given.scored(documents)) for name, documents in given.domains().items()
        )
        rates = np.array([one.exit_rate for one in domains])
        rate_errors = np.array([one.exit_rate_error for one in domains])
        mean = float(rates.mean()) or 1.0  # where nothing leaves, all domains are alike
        exit_variance = between_variance(rates / mean, rate_errors / mean)
        unit = math.log1p(given.config.ppl_tolerance)
        rises = np.array([one.log_rise for one in domains]) / unit
        rise_errors = np.array([one.log_rise_error for one in domains]) / unit
        quality_variance = between_variance(rises, rise_errors)
        return ShiftOutcome(
            name=self.name,
            passed=max(exit_variance, quality_variance) < limit,
            criterion=criterion,
            found=f"exit rates {exit_variance:.3f}, quality {quality_variance:.3f}",
            notes=_notes(domains, given),
            domains=domains,
            exit_variance=exit_variance,
            quality_variance=quality_variance,
            raw_exit_variance=float(rates.var(ddof=1)),
        )


def between_variance(values: npt.NDArray[np.float64], errors: npt.NDArray[np.float64]) -> float:
    """Variance of what K estimates estimate, beyond that of the estimates themselves.

    `max(0, s^2 - mean(e^2))`, where `s^2` is the sample variance of the values (divisor K - 1) and
    e are their standard errors: the expectation of `s^2` is the variance between the true values
    plus the mean of the squared errors.

    Args:
        values: Estimates, shape `[K]`, K at least 2.
        errors: Their standard errors, shape `[K]`.

    Returns:
        The variance; infinite where a value is not finite.
    """
    if not np.isfinite(values).all():
        return math.inf
    return float(max(0.0, values.var(ddof=1) - np.square(errors).mean()))


def _domain(name: str, rows: Sequence[dict[str, Any]]) -> Domain:
    scored = [row for row in rows if row["tokens"] > 0 and row["base_nll"] is not None]
    tokens = np.array([row["tokens"] for row in scored], np.float64)
    steps = np.array([row["decode_steps"] for row in scored], np.float64)
    if len(scored) < 2 or not steps.sum():
        raise CalibrationError(
            f"domain {name!r}: {len(scored)} documents with {int(steps.sum())} decode steps can be "
            "scored; give at least 2 documents that go on for two tokens after their prompts."
        )
    left = np.array([row["exits"] for row in scored], np.float64)
    # What exits made NaN must not drop out.
    rises = np.array(
        [
            math.inf if row["sedac_nll"] is None else row["sedac_nll"] - row["base_nll"]
            for row in scored
        ]
    )
    rise = float((rises * tokens).sum() / tokens.sum())
    return Domain(
        name=name,
        documents=len(scored),
        tokens=int(tokens.sum()),
        exit_rate=float(left.sum() / steps.sum()),
        exit_rate_error=ratio_standard_error(left, steps),
        ppl_increase=float(np.expm1(min(rise, 700.0))) if math.isfinite(rise) else math.inf,
        log_rise=rise,
        log_rise_error=ratio_standard_error(rises * tokens, tokens),
    )


def _notes(domains: Sequence[Domain], given: SuiteInput) -> tuple[str, ...]:
    notes = []
    if added := [one.name for one in domains if one.name not in given.given]:
        notes.append(f"{', '.join(added)}: prompts of the package, answered by the baseline.")
    limit = given.config.ppl_tolerance
    above = [one for one in domains if not one.ppl_increase < limit]
    if above:
        worst = max(above, key=lambda one: one.ppl_increase)
        notes.append(f"perplexity rises most on {worst.name}: {worst.ppl_increase:+.2%}.")
    if not any(one.exit_rate for one in domains):
        notes.append("no token left early in any domain.")
    return tuple(notes)
