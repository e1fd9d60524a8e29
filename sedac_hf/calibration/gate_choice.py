"""From probes to gates: learn fusion, search every variant, and keep the parts that pay."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sedac_hf.calibration.gate_stage import (
    FittedFusion,
    TracedSplit,
    entropy_price,
    fit_fusion,
    fused_traces,
)
from sedac_hf.calibration.token_facts import collect_facts
from sedac_hf.calibration.variants import Material, SearchedVariants, search_variants
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.token_routing import token_classes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.pareto import Policy
    from sedac_hf.calibration.probe_training import FittedProbes
    from sedac_hf.calibration.states import BaseStates
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead

__all__ = ["ChosenGates", "choose_gates"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenGates:
    """What was learned, and what of it is used.

    Attributes:
        parts: Fusion weights and classes of tokens, for the artefact.
        fusion: How the fused gates compare, and what each modality adds.
        found: All variants and the chosen one.
        traces: Traces of the search documents by the chosen kind of fusion.
    """

    parts: GateParts
    fusion: FittedFusion
    found: SearchedVariants
    traces: Traces

    @property
    def front(self) -> list[Policy]:
        """Policies of the chosen variant."""
        return self.found.fronts[self.found.chosen.name]


def choose_gates(
    heads: Sequence[ExitHead],
    fitted: FittedProbes,
    shell: BaseShell,
    states: BaseStates,
    train: Sequence[int],
    judge: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    costs: CostModel,
    *,
    epsilon: float,
    attention: Sequence[float] | None = None,
    seed: int = 0,
) -> ChosenGates:
    """Learn on the probes' documents, judge and search on the others.

    Args:
        heads: Exit heads in the order of their checkpoints.
        fitted: Their probes, with traces of both lots of documents.
        shell: Shell of the base.
        states: Recorded states.
        train: Documents that the probes were trained on.
        judge: Documents that gates are judged and policies searched on.
        tokenizer: Says what kind of text each token is.
        costs: What probes, tries and exits cost.
        epsilon: Perplexity increase aimed at, as a fraction.
        attention: What it costs to see how evenly the layer of each checkpoint attends, as a
            fraction of a full pass; None leaves that evidence out.
        seed: Seed of every draw.

    Returns:
        The gates.
    """
    seen = TracedSplit(train, fitted.seen, collect_facts(heads, shell, states, train))
    fresh = TracedSplit(judge, fitted.traces, collect_facts(heads, shell, states, judge))
    fusion = fit_fusion(
        heads, fitted.probes, states, seen, fresh, costs,
        epsilon=epsilon, attention=attention, seed=seed,
    )  # fmt: skip
    traces, prices = {"none": fresh.traces}, {"none": costs}
    for kind in ("static", "gated") if fusion.fusion is not None else ():
        assert fusion.fusion is not None
        traces[kind] = fused_traces(fusion.fusion, kind, heads, fitted.probes, states, fresh)
        prices[kind] = _dearer(costs, fusion.extra[kind])
    table = token_classes(tokenizer, shell.vocabulary_size)
    found = search_variants(
        Material(
            traces, fresh.facts, prices, table,
            entropy_price(fitted.probes, shell.vocabulary_size, costs),
            fusion_pays=fusion.pays,
        ),
        epsilon=epsilon,
        seed=seed,
    )  # fmt: skip
    logger.info("tokens leave by: %s", found.chosen.name)
    parts = GateParts(fusion.fusion, table)
    return ChosenGates(parts, fusion, found, traces[found.chosen.fusion])


def _dearer(costs: CostModel, extra: Sequence[float]) -> CostModel:
    """Costs with something more to pay for each token that is asked."""
    checkpoints = [
        replace(each, probe=each.probe + more)
        for each, more in zip(costs.checkpoints, extra, strict=True)
    ]
    return replace(costs, checkpoints=tuple(checkpoints))
