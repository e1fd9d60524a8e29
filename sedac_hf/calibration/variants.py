"""Which of fusion, routing and adaptive decay pay: each is searched, and judged on other documents.

Policies are searched by replay on one half of the search documents and judged on the other, both
ways round, so that a part with more to adjust gets no credit for fitting noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.calibration.candidates import PolicyVectors
from sedac_hf.calibration.pareto import (
    History,
    Policy,
    pareto_front,
    pareto_indices,
    replayed,
    usable_documents,
)
from sedac_hf.calibration.policy_search import most_cost, with_temperatures
from sedac_hf.calibration.route_search import choose_routes, routed_traces
from sedac_hf.core.cascade_options import AdaptiveDecay, ClassRule
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.token_facts import TokenFacts
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.core.cascade_controller import CascadeConfig

__all__ = ["Material", "SearchedVariants", "Variant", "front_of", "search_variants"]

logger = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]
# Saving, as a fraction of a full pass, below which a part is not worth having.
_LEAST_SAVING = 0.002
# Entropies of full depth above this quantile count as wholly uncertain.
_UNCERTAIN = 0.9
# Candidates of a search that only judges.
_FEW_CANDIDATES = 2000


@dataclass(frozen=True)
class Variant:
    """One combination of parts.

    Attributes:
        name: What it is called in tables.
        fusion: As in `CascadeConfig`.
        adaptive_decay: Likewise.
        routes: Likewise.
    """

    name: str
    fusion: str = "none"
    adaptive_decay: AdaptiveDecay | None = None
    routes: tuple[ClassRule, ...] = ()

    def of(self, cascade: CascadeConfig) -> Variant:
        """The parts that some rules use, under the same name."""
        return replace(
            self,
            fusion=cascade.fusion,
            adaptive_decay=cascade.adaptive_decay,
            routes=tuple(cascade.routes),
        )

    def on(self, cascade: CascadeConfig) -> CascadeConfig:
        """Rules with these parts in use."""
        return replace(
            cascade,
            fusion=self.fusion,
            adaptive_decay=self.adaptive_decay,
            routes=self.routes,
        )


@dataclass(frozen=True)
class Material:
    """What variants are searched on.

    Attributes:
        traces: Traces by kind of fusion, those of `"none"` among them.
        facts: What else is known of the same tokens.
        costs: What probes, tries and exits cost, by kind of fusion.
        token_classes: Class of every token, or None.
        entropy_price: What the entropy of a token of full depth costs, which an adaptive decay
            follows, as a fraction of a full pass.
        fusion_pays: Whether fusion may be chosen, or is only shown beside the rest.
    """

    traces: Mapping[str, Traces]
    facts: TokenFacts
    costs: Mapping[str, CostModel]
    token_classes: npt.NDArray[np.uint8] | None
    entropy_price: float = 0.0
    fusion_pays: bool = True


@dataclass(frozen=True)
class SearchedVariants:
    """All variants, and the one that is to be used.

    Attributes:
        chosen: The variant that pays best.
        fronts: Policies of each variant by increasing estimated delta and falling cost.
        variants: The variants by name.
        judged: Cost of a decode step within the budget on documents that it was not searched on.
    """

    chosen: Variant
    fronts: dict[str, list[Policy]]
    variants: dict[str, Variant]
    judged: dict[str, float]

    def table(
        self, walk: Sequence[Policy], temperatures: Sequence[float], epsilon: float
    ) -> list[dict[str, Any]]:
        """One row a variant: its policy at the target, and what was judged.

        Args:
            walk: Policies of the chosen variant with verified deltas; they tell by how much replay
                underestimates.
            temperatures: What the logits of exits at each checkpoint are divided by.
            epsilon: Perplexity increase aimed at, as a fraction.
        """
        fronts = {
            name: [with_temperatures(policy, temperatures) for policy in front]
            for name, front in self.fronts.items()
        }
        replayed_at = {p.cascade: p.estimated_delta for p in fronts[self.chosen.name]}
        pairs = [(p.estimated_delta, replayed_at.get(p.cascade, 0.0)) for p in walk]
        true, estimated = (sum(pair[at] for pair in pairs if pair[1] > 0) for at in (0, 1))
        inflation = max(true / estimated, 0.5) if estimated > 0 else 1.0
        rows = []
        for name, front in fronts.items():
            below = [p for p in front if p.estimated_delta * inflation <= math.log1p(epsilon)]
            policy = below[-1] if below else None
            rows.append(
                {
                    "name": name,
                    "judged_cost": self.judged[name],
                    "chosen": name == self.chosen.name,
                    "policy": None if policy is None else policy.to_dict(),
                }
            )
        return rows


def search_variants(
    material: Material, *, epsilon: float, candidates: int = 6000, seed: int = 0
) -> SearchedVariants:
    """Search every variant and choose the parts that pay.

    Fusion is chosen first, then the decay and the routes beside it; what saves less than a
    five-hundredth of a pass stays off.

    Args:
        material: Traces and what goes with them.
        epsilon: Perplexity increase aimed at, as a fraction.
        candidates: Threshold vectors to replay for each front.
        seed: Seed of the search.

    Returns:
        The variants.
    """
    limit = math.log1p(epsilon)
    judged: dict[str, float] = {}
    variants: dict[str, Variant] = {}

    def take(variant: Variant) -> None:
        variants[variant.name] = variant
        judged[variant.name] = _judge(variant, material, limit, seed)

    best = Variant("entropy alone")
    take(best)
    for kind, name in (("static", "fused"), ("gated", "gated")):
        if kind in material.traces:
            take(Variant(name, fusion=kind))
            if material.fusion_pays:
                best = _better(variants[name], best, judged)
    core = best
    decay = _decay_for(material.facts)
    with_decay = replace(core, name=f"{core.name}, decay on", adaptive_decay=decay)
    take(with_decay)
    best = _better(with_decay, best, judged)
    if material.token_classes is not None:
        routes = _routes(core, material, limit, seed)
        routed = replace(core, name=f"{core.name}, routing on", routes=routes)
        take(routed)
        if _better(routed, core, judged) is routed:
            # On top of whatever the decay made of it.
            both = replace(best, name=f"{best.name}, routing on", routes=routes)
            if both.name not in variants:
                take(both)
            best = min((routed, both, best), key=lambda each: judged[each.name])
    logger.info("cost of a step within the budget, on other documents: %s", judged)
    fronts = {
        name: front_of(variant, material, candidates=candidates, seed=seed)
        for name, variant in variants.items()
    }
    return SearchedVariants(best, fronts, variants, judged)


def _better(new: Variant, old: Variant, judged: Mapping[str, float]) -> Variant:
    return new if judged[new.name] < judged[old.name] - _LEAST_SAVING else old


def _decay_for(facts: TokenFacts) -> AdaptiveDecay:
    """An adaptive decay whose scale fits the texts."""
    finite = facts.entropy[np.isfinite(facts.entropy)]
    scale = float(np.quantile(finite, _UNCERTAIN)) if len(finite) else 1.0
    return AdaptiveDecay(
        scale=float(np.float32(max(scale, 1e-3))),
        bonus=float(np.float32(0.25)),
        momentum=float(np.float32(0.9)),
    )


def _routes(variant: Variant, material: Material, limit: float, seed: int) -> tuple[ClassRule, ...]:
    """The best routes beside a variant's fusion."""
    assert material.token_classes is not None
    traces, costs = material.traces[variant.fusion], material.costs[variant.fusion]
    tokens = material.facts.tokens
    return choose_routes(traces, tokens, material.token_classes, costs, limit=limit, seed=seed)


def front_of(
    variant: Variant, material: Material, *, candidates: int = 6000, seed: int = 0
) -> list[Policy]:
    """Policies of a variant by increasing delta and falling cost.

    Args:
        variant: The parts in use.
        material: Traces and what goes with them.
        candidates: Threshold vectors to replay.
        seed: Seed of the search.
    """
    traces, costs, history = _setting(variant, material)
    limit = most_cost(costs)
    front = pareto_front(
        traces, costs, candidates=candidates, seed=seed, most_cost=limit, history=history
    )
    price = 0.0 if variant.adaptive_decay is None else material.entropy_price
    front = [
        replace(
            policy,
            cascade=variant.on(policy.cascade),
            cost=policy.cost + price * (1.0 - policy.exit_share),
        )
        for policy in front
    ]
    delta = np.array([policy.estimated_delta for policy in front])
    best = pareto_indices(delta, np.array([policy.cost for policy in front]))
    return [front[at] for at in best if front[at].cost < limit]


def _setting(variant: Variant, material: Material) -> tuple[Traces, CostModel, History | None]:
    """What a variant's thresholds are replayed on."""
    traces, facts = material.traces[variant.fusion], material.facts
    if variant.routes:
        assert material.token_classes is not None
        traces = routed_traces(traces, facts.tokens, material.token_classes, variant.routes)
    rule = variant.adaptive_decay
    history = None if rule is None else (facts.entropy, rule.scale, rule.bonus, rule.momentum)
    return traces, material.costs[variant.fusion], history


def _judge(variant: Variant, material: Material, limit: float, seed: int) -> float:
    """Cost of a step within the budget, searched on one half and judged on the other."""
    documents = len(next(iter(material.traces.values())).doc_offsets) - 1
    odd = np.arange(documents) % 2 == 1
    costs = []
    for part in (odd, ~odd):
        try:
            searched, other = _half(material, part), _half(material, ~part)
            here = variant
            if variant.routes:
                here = replace(variant, routes=_routes(variant, searched, limit, seed))
            front = front_of(here, searched, candidates=_FEW_CANDIDATES, seed=seed)
            price = 0.0 if variant.adaptive_decay is None else material.entropy_price
            costs.append(_cost_within(front, *_setting(here, other), limit, price))
        except CalibrationError:
            costs.append(1.0)
    return float(np.mean(costs))


def _cost_within(
    front: Sequence[Policy],
    traces: Traces,
    costs: CostModel,
    history: History | None,
    limit: float,
    price: float,
) -> float:
    """Least cost among policies that keep within the budget; a plain step where none does.

    `price` is paid for each token of full depth.
    """
    if not front:
        return 1.0
    vectors = PolicyVectors.of([policy.cascade for policy in front])
    delta, share, cost = replayed(vectors, traces, costs, usable_documents(traces), history)
    within = (cost + price * (1.0 - share))[delta <= limit]
    return float(min(within.min(initial=1.0), 1.0))


def _half(material: Material, documents: BoolArray) -> Material:
    """The part of the material that belongs to some documents."""
    offsets = next(iter(material.traces.values())).doc_offsets
    rows = np.repeat(documents, np.diff(offsets))
    return replace(
        material,
        traces={kind: traces.of_documents(documents) for kind, traces in material.traces.items()},
        facts=material.facts.of_tokens(rows),
    )
