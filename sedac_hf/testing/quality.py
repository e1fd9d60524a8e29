"""Does the model say what its baseline says?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sedac_hf.evaluation.agreement import Divergence, base_logits, divergences, rows_equal
from sedac_hf.evaluation.arms import Arm, Batch, make_batches, mode_arm
from sedac_hf.evaluation.benchmark import encode_prompts, greedy_settings, keep_stats
from sedac_hf.testing.outcome import TestOutcome

if TYPE_CHECKING:
    from sedac_hf.testing.suite_input import SuiteInput

__all__ = ["AgreementOutcome", "QualityOutcome", "QualityTest"]


@dataclass(frozen=True, kw_only=True)
class QualityOutcome(TestOutcome):
    """Perplexity with exits against the baseline's.

    Attributes:
        base_ppl: `exp(sum of the baseline's NLL / tokens)` over all scored tokens, those after a
            document's prompt.
        sedac_ppl: The same under the model, every token following the exit rule of generation.
        ppl_increase: `sedac_ppl / base_ppl - 1`.
        interval: 95 % interval of it: paired bootstrap over documents, percentiles of 2000
            resamples.
        document_increase: Rise of the geometric mean of the documents' perplexities, which is what
            a certificate bounds.
        exit_share: Share of the decode steps that left early.
        mean_depth: Mean number of layers of a decode step.
        depth: Layers of the base.
        documents: Documents scored.
        tokens: Tokens scored.
    """

    base_ppl: float
    sedac_ppl: float
    ppl_increase: float
    interval: tuple[float, float]
    document_increase: float
    exit_share: float
    mean_depth: float
    depth: int
    documents: int
    tokens: int

    def details(self) -> list[tuple[str, str]]:
        """Perplexities and exits."""
        return [
            ("perplexity, baseline and model", f"{self.base_ppl:.3f} and {self.sedac_ppl:.3f}"),
            ("scored", f"{self.tokens} tokens of {self.documents} documents"),
            (
                "tokens that left early",
                f"{self.exit_share:.1%}, mean depth {self.mean_depth:.1f} of {self.depth} layers",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class AgreementOutcome(TestOutcome):
    """Greedy texts of a mode in which the full depth has the last word, against the baseline's.

    Attributes:
        texts: Texts that were compared, `max_new_tokens` tokens each.
        equal: Share of them that are the baseline's, token by token.
        largest_gap: Largest distance of the baseline's logits of the two tokens where a text first
            differs; 0 where none does.
        largest_units: The same in units of the resolution that the data type has there.
    """

    texts: int
    equal: float
    largest_gap: float
    largest_units: float

    def details(self) -> list[tuple[str, str]]:
        """Where texts part."""
        gap = f"{self.largest_gap:.3g} ({self.largest_units:.1f} units of rounding)"
        return [("texts compared", str(self.texts)), ("largest gap where they part", gap)]


class QualityTest:
    """Perplexity rises by less than `ppl_tolerance`.

    In certified mode the statistic is `ppl_increase` of all documents together, see
    `QualityOutcome`; with `judge_upper_end` it is the upper end of its 95 % interval.

    Where exits are not final there is no perplexity of given texts to measure. In exact and plain
    mode greedy texts are compared instead: every text must be the baseline's, or part from it at a
    tie, which is where the baseline's own logits of the two tokens are within `tie_units` units of
    its data type's resolution. Rounding alone parts two orders of summation there.
    """

    name = "quality"

    def run(self, given: SuiteInput) -> TestOutcome:
        """Measure.

        Args:
            given: Models, texts and limits.
        """
        return self._perplexity(given) if given.exits_act else self._agreement(given)

    def _perplexity(self, given: SuiteInput) -> QualityOutcome:
        config, found = given.config, given.perplexity(given.documents)
        low, high = found.ppl_increase_ci95
        judged = high if config.judge_upper_end else found.ppl_increase
        limit = config.ppl_tolerance
        notes = []
        if low < limit <= high:
            notes.append(
                f"{limit:.2%} lies within the interval: {found.documents} documents are too few to "
                "tell."
            )
        if found.not_scored:
            notes.append(f"{found.not_scored} documents have no finite loss under the baseline.")
        what = (
            "the upper end of the rise of perplexity"
            if config.judge_upper_end
            else ("the rise of perplexity")
        )
        return QualityOutcome(
            name=self.name,
            passed=judged < limit,
            criterion=f"{what} is below {limit:.2%}",
            found=f"{found.ppl_increase:+.2%} [{low:+.2%}, {high:+.2%}]",
            notes=tuple(notes),
            base_ppl=found.base_ppl,
            sedac_ppl=found.sedac_ppl,
            ppl_increase=found.ppl_increase,
            interval=(low, high),
            document_increase=found.document_increase,
            exit_share=found.exit_share,
            mean_depth=found.mean_depth,
            depth=found.depth,
            documents=found.documents,
            tokens=found.tokens,
        )

    def _agreement(self, given: SuiteInput) -> AgreementOutcome:
        config = given.config
        equal, parted = _compare_texts(given)
        units = max((one.units for one in parted), default=0.0)
        gap = max((one.gap for one in parted), default=0.0)
        share = sum(equal) / len(equal)
        notes = [f"{given.why_no_exits}: what is compared is the text that it writes."]
        return AgreementOutcome(
            name=self.name,
            # not (x > limit): a gap that is NaN is no tie
            passed=len(parted) == equal.count(False)
            and all(one.units <= config.tie_units for one in parted),
            criterion=f"greedy texts are the baseline's, ties of {config.tie_units:g} units aside",
            found=f"{share:.0%} of {len(equal)} texts equal, largest gap {units:.1f} units",
            notes=tuple(notes),
            texts=len(equal),
            equal=share,
            largest_gap=gap,
            largest_units=units,
        )


def _compare_texts(given: SuiteInput) -> tuple[list[bool], list[Divergence]]:
    """Which greedy texts are the baseline's, and where the others part from it."""
    config, model = given.config, given.model
    rows = encode_prompts(given.prompts(), None, config.prompts)
    settings = greedy_settings(model, config.max_new_tokens)
    generate: Any = given.baseline.generate
    written = {
        "baseline": Arm(
            lambda batch: generate(input_ids=batch.ids, attention_mask=batch.mask, **settings)
        ),
        "model": mode_arm(model, given.mode, settings),
    }
    logits = base_logits(given.wrapped_baseline)
    equal: list[bool] = []
    parted: list[Divergence] = []
    for batch in make_batches([row[0].tolist() for row in rows], 1, pad=0, device=model.device):
        with keep_stats(model):
            texts = {name: _text(arm, batch) for name, arm in written.items()}
        equal += rows_equal(texts["model"], texts["baseline"])
        parted += divergences(batch, texts["model"], texts["baseline"], logits)
    return equal, parted


def _text(arm: Arm, batch: Batch) -> torch.Tensor:
    arm(batch)
    return arm.texts[batch.index]
