"""Modes against the base and its built-in rivals, over prompt groups and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sedac_hf.evaluation.agreement import Divergence, base_logits, divergences, rows_equal
from sedac_hf.evaluation.arms import Arm, Batch, base_arm, make_batches, mode_arm, on_modules
from sedac_hf.evaluation.bench_budget import EARLY_EXIT_CALLS, Budget
from sedac_hf.evaluation.bench_plan import BenchPlan
from sedac_hf.evaluation.bench_rows import Measured, build_row
from sedac_hf.evaluation.benchmark import fresh_stats, greedy_settings, keep_stats, take_turns
from sedac_hf.evaluation.environment import commit
from sedac_hf.evaluation.report import head_share
from sedac_hf.evaluation.rivals import (
    EarlyExitSearch,
    best_early_exit,
    early_exit_arm,
    lookup_arm,
    reason_against,
)

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["BenchResult", "run_bench"]

_SEARCH_PROMPTS = 2

Prompts = Mapping[str, Sequence[Sequence[int]]]
Progress = Callable[[str], AbstractContextManager[Any]]


@dataclass
class BenchResult:
    """Rows, and what goes with them.

    Attributes:
        rows: One for each mode, group and batch size that was measured.
        left_out: What was not measured, and why.
        early_exit: The search for the best layer of early-exit drafting; None where batches of one
            prompt were not asked for.
        seconds: How long everything took.
        commit: The commit that was measured.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    early_exit: EarlyExitSearch | None = None
    seconds: float = 0.0
    commit: str | None = field(default_factory=commit)


def run_bench(
    model: SedacForCausalLM,
    prompts: Prompts,
    plan: BenchPlan,
    *,
    pad: int = 0,
    in_float32: Callable[[], SedacForCausalLM] | None = None,
    llama: Arm | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a model.

    Args:
        model: The wrapped model.
        prompts: Token ids of the prompts of each group.
        plan: What to measure.
        pad: Token that fills up shorter prompts.
        in_float32: Gives the model in float32, where it runs in something else; without it tokens
            are not compared there.
        llama: llama.cpp with the same weights.
        progress: Gives a context that says what is being measured.

    Returns:
        Rows, each a ratio of arms that took turns in this run.

    Raises:
        CalibrationError: If a group has no prompts.
    """
    return _Bench(model, plan, pad, in_float32, llama).run(prompts, progress or nullcontext)


class _Bench:
    """One run: its arms, its clock and what it has found."""

    def __init__(
        self,
        model: SedacForCausalLM,
        plan: BenchPlan,
        pad: int,
        in_float32: Callable[[], SedacForCausalLM] | None,
        llama: Arm | None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._pad = pad
        self._llama = llama
        self._in_float32 = in_float32
        self._reference = model if model.dtype == torch.float32 else None
        choice = model.pass_choice()
        self._native = choice.name == "native"
        self._budget = Budget(plan, native=self._native)
        self._result = BenchResult()
        self._warm: set[int] = set()  # batch sizes that were measured before
        self._modes: list[str] = []
        if not self._native:
            reason = f"every mode runs on them here ({choice.reason})"
            self._result.left_out.append(f"rows of the base's modules apart: {reason}")

    def run(self, prompts: Prompts, progress: Progress) -> BenchResult:
        plan, result = self._plan, self._result
        for mode in plan.modes:
            reason = self._model.refused_modes.get(mode)
            if reason is None:
                self._modes.append(mode)
            else:
                result.left_out.append(f"{mode}: {reason}")
        if self._in_float32 is None and self._reference is None:
            result.left_out.append("tokens in float32: there is no model in float32 to compare")
        if 1 in plan.batches:
            with progress("looking for the best layer of assistant_early_exit"):
                result.early_exit = self._search(prompts)
        cells = list(self._cells(prompts))
        for at, (group, rows, batches) in enumerate(cells):
            name, left = f"{group} at batch {rows}", [others for *_, others in cells[at:]]
            count = self._budget.affordable(left)
            if count:
                limit = self._budget.limit(left)
                with progress(f"{name}: {count} batches, arms taking turns"):
                    cell = self._measure(group, batches[:count], limit)
                result.rows += self._rows(cell)
                count = len(cell.batches)
            if count < len(batches):
                of = f"{count} of {len(batches)} batches, " if count else ""
                result.left_out.append(f"{name}: {of}no time left")
        result.seconds = self._budget.spent
        return result

    def _cells(self, prompts: Prompts) -> Iterator[tuple[str, int, list[Batch]]]:
        """Groups and batch sizes, small batches first."""
        for rows in sorted(self._plan.batches):
            for group in self._plan.groups:
                every = prompts.get(group, ())
                count = min(max(self._plan.prompts, rows), len(every))
                picks = np.linspace(0, len(every) - 1, count).round().astype(int)
                chosen = [every[at] for at in picks]
                device = self._model.device
                yield group, rows, make_batches(chosen, rows, pad=self._pad, device=device)

    def _search(self, prompts: Prompts) -> EarlyExitSearch:
        firsts = [prompts[group][0] for group in self._plan.groups if prompts.get(group)]
        device = self._model.device
        tokens = min(self._plan.search_tokens, self._plan.tokens)
        batches = make_batches(firsts[:_SEARCH_PROMPTS], 1, pad=self._pad, device=device)
        found = best_early_exit(self._model, batches, tokens)
        if found.layer is not None:
            self._budget.expect(found.seconds_per_token[found.layer] / EARLY_EXIT_CALLS)
        return found

    def _rows(self, cell: Measured) -> list[dict[str, Any]]:
        names = [*self._names(cell.rows), *(["llama_cpp"] if "llama_cpp" in cell.seconds else [])]
        share, seed = head_share(self._model), self._plan.seed
        return [build_row(cell, name, head_share=share, seed=seed) for name in names]

    def _measure(self, group: str, batches: Sequence[Batch], limit: float | None) -> Measured:
        model, plan, begun = self._model, self._plan, self._budget.spent
        rows = len(batches[0].ids)
        settings = greedy_settings(model, plan.tokens)
        names = self._names(rows)
        arms = _arms(model, names, settings)
        rivals, reasons = self._rivals(batches[0], settings)
        arms |= rivals
        counted = {name: fresh_stats(model) for name in names if name != "off"}
        seconds = take_turns(
            model,
            arms,
            batches,
            rounds=plan.repeats,
            counted=counted,
            warm_up=plan.warmed_up(rows in self._warm),
            limit=limit,
        )
        batches = batches[: seconds["generate"].shape[1]]
        equal = self._equal(batches, names, arms, settings)
        apart = {name: _apart(model, batches, arms, name) for name in names}
        self._budget.learn(self._budget.spent - begun, batches)
        self._warm.add(rows)
        return Measured(
            group=group,
            rows=rows,
            batches=batches,
            arms=arms,
            seconds=seconds,
            counts={name: stats.to_dict() for name, stats in counted.items()},
            equal=equal,
            apart=apart,
            reasons=reasons,
            notes=self._notes(),
        )

    def _rivals(
        self, batch: Batch, settings: dict[str, Any]
    ) -> tuple[dict[str, Arm], dict[str, str]]:
        """What else can write this, and why the rest cannot."""
        if len(batch.ids) > 1:
            only = "works at batch 1 only"
            return {}, dict.fromkeys(("assistant_early_exit", "prompt_lookup"), only)
        arms: dict[str, Arm] = {}
        reasons: dict[str, str] = {}
        lookup = lookup_arm(self._model, settings)
        reason = reason_against(lookup, batch)
        if reason is None:
            arms["prompt_lookup"] = lookup
        else:
            reasons["prompt_lookup"] = reason
        search = self._result.early_exit
        if search is not None and search.layer is not None:
            arms["assistant_early_exit"] = early_exit_arm(self._model, search.layer, settings)
        elif search is not None and search.reason is not None:
            reasons["assistant_early_exit"] = search.reason
        if self._llama is not None:
            arms["llama_cpp"] = self._llama
        return arms, reasons

    def _names(self, rows: int) -> list[str]:
        """The arms that get rows: modes, and those of them that also run on the modules."""
        second = self._plan.second_modes(rows) if self._native else ()
        return [*self._modes, *(on_modules(mode) for mode in second if mode in self._modes)]

    def _equal(
        self,
        batches: Sequence[Batch],
        names: Sequence[str],
        arms: Mapping[str, Arm],
        settings: dict[str, Any],
    ) -> dict[str, list[bool]]:
        """By arm, whether each row has the base's tokens in float32."""
        checked = batches
        if self._model.dtype != torch.float32:
            if self._reference is None and self._in_float32 is not None:
                self._reference = self._in_float32()
            if self._reference is None:
                return {}
            arms = _arms(self._reference, names, settings)
            checked = batches[: self._plan.checked]
            with keep_stats(self._reference):
                for arm in arms.values():
                    for batch in checked:
                        arm(batch)
        return {
            name: [
                same
                for batch in checked
                for same in rows_equal(
                    arms[name].texts[batch.index], arms["generate"].texts[batch.index]
                )
            ]
            for name in names
        }

    def _notes(self) -> dict[str, list[str]]:
        model = self._model
        policy = model.certificate.policy if model.certificate else None
        if model.cascade is None:
            note = "exits are off: no policy is certified for this model"
        elif model.exits_off_reason:
            note = f"exits are off: {model.exits_off_reason}"
        elif policy is None or policy.cascade != model.cascade:
            note = "exits act on thresholds that no certificate covers"
        else:
            return {}
        return {"certified": [note]}


def _apart(
    model: SedacForCausalLM, batches: Sequence[Batch], arms: Mapping[str, Arm], name: str
) -> list[Divergence]:
    """Where the rows of an arm part from the base's text."""
    logits, found = base_logits(model), list[Divergence]()
    for batch in batches:
        ours, theirs = (arms[each].texts[batch.index] for each in (name, "generate"))
        found += divergences(batch, ours, theirs, logits)
    return found


def _arms(
    model: SedacForCausalLM, names: Sequence[str], settings: dict[str, Any]
) -> dict[str, Arm]:
    """The base's own call and ours; plain always, to tell loop and exits apart."""
    second = [name for name in names if name.endswith(on_modules(""))]
    every = dict.fromkeys(("plain", *names, *([on_modules("plain")] if second else [])))
    arms = {"generate": base_arm(model, settings)}
    for name in every:
        mode = name.removesuffix(on_modules(""))
        arms[name] = mode_arm(model, mode, settings, native=mode == name)
    return arms
