"""Rules by class of token: factors that let easy classes leave more boldly, and hard ones less.

Classes do not touch one another in a replay, so the best factors of each are found alone: for a
price of harm, each class takes what costs least; the price is set so that the whole does no more
harm than the same rules for all.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf import _core
from sedac_hf.calibration.candidates import PolicyVectors
from sedac_hf.calibration.pareto import pareto_front, usable_documents
from sedac_hf.core.cascade_options import ClassRule
from sedac_hf.core.token_routing import TOKEN_CLASSES, classes_of

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.core.cascade_controller import CascadeConfig

__all__ = ["choose_routes", "routed_traces"]

FloatArray = npt.NDArray[np.float64]
Classes = npt.NDArray[np.uint8]
_THRESHOLDS = (0.0, 0.5, 0.75, 1.0, 1.5, 2.5)
_GAPS = (0.5, 0.75, 1.0, 1.5, 2.5)
# Tokens below which a class keeps the rules of all.
_LEAST_TOKENS = 200
_CANDIDATES = 2000


def choose_routes(
    traces: Traces,
    tokens: npt.NDArray[np.int64],
    table: Classes,
    costs: CostModel,
    *,
    limit: float,
    seed: int = 0,
) -> tuple[ClassRule, ...]:
    """Factors of each class around the best rules for all.

    Args:
        traces: Traces of the search documents.
        tokens: Token that is read at each row, ``[T]``.
        table: Class of every token.
        costs: What probes, tries and exits cost.
        limit: Mean rise of the NLL aimed at, nats.
        seed: Seed of the search for the rules for all.

    Returns:
        One rule a class; all alike where nothing leaves within the limit.
    """
    same = (ClassRule(),) * len(TOKEN_CLASSES)
    front = pareto_front(traces, costs, candidates=_CANDIDATES, seed=seed)
    below = [policy for policy in front if policy.estimated_delta <= limit]
    if not below:
        return same
    cascade = below[-1].cascade
    asks = any(layer.min_probability > 0 for layer in cascade.layers)
    rules = [ClassRule(t, g) for t, g in product(_THRESHOLDS, _GAPS if asks else (1.0,))]
    rules.sort(key=lambda rule: rule != ClassRule())  # the plain rule first: it wins ties
    classes = classes_of(table, tokens)
    harm, cost = (np.zeros((len(TOKEN_CLASSES), len(rules))) for _ in range(2))
    for kind in range(len(TOKEN_CLASSES)):
        use = traces.eligible & (classes == kind)
        if use.sum() >= _LEAST_TOKENS:
            harm[kind], cost[kind] = _of_class(cascade, rules, traces, use, costs)
    chosen = _cheapest(harm, cost)
    return tuple(rules[at] for at in chosen)


def routed_traces(
    traces: Traces,
    tokens: npt.NDArray[np.int64],
    table: Classes,
    routes: tuple[ClassRule, ...],
) -> Traces:
    """Traces on which the rules for all do what rules by class do on the given ones.

    A threshold times a factor is a risk divided by it; so with the gap to a probability of 1.

    Args:
        traces: The traces.
        tokens: Token that is read at each row, ``[T]``.
        table: Class of every token.
        routes: One rule a class.

    Returns:
        The same traces but for `risk` and `probability`; NaN where a class may not leave.
    """
    classes = classes_of(table, tokens)
    known = np.minimum(classes, len(routes) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.array([rule.threshold for rule in routes], np.float32)[known, None]
        gap = np.array([rule.gap for rule in routes], np.float32)[known, None]
        barred = (scale <= 0) | (classes >= len(routes))[:, None]
        risk = np.where(barred, np.float32(np.nan), traces.risk / scale)
        shortfall = 1 - traces.probability
        sure = 1 - np.where(gap > 0, shortfall / gap, np.where(shortfall > 0, np.inf, 0.0))
    return replace(
        traces,
        risk=np.ascontiguousarray(risk, np.float32),
        probability=np.ascontiguousarray(sure, np.float32),
    )


def _of_class(
    cascade: CascadeConfig,
    rules: list[ClassRule],
    traces: Traces,
    use: npt.NDArray[np.bool_],
    costs: CostModel,
) -> tuple[FloatArray, FloatArray]:
    """Harm and cost that the tokens of one class add under each rule, ``[rules]`` each."""
    vectors = PolicyVectors.of(
        [
            replace(
                cascade,
                layers=[
                    replace(
                        layer,
                        threshold=rule.threshold_of(layer),
                        min_probability=rule.least_of(layer),
                    )
                    for layer in cascade.layers
                ],
            )
            for rule in rules
        ]
    )
    out = _core.replay(
        traces.risk, traces.probability, traces.delta_nll, use, traces.doc_offsets,
        vectors.tau, vectors.weight, vectors.gamma, vectors.exit_confidence,
        vectors.min_probability,
    )  # fmt: skip
    harm = out["doc_delta"][:, usable_documents(traces)].mean(axis=1, dtype=np.float64)
    cost = (
        costs.expected(out["exits"], out["tries"], vectors.min_probability > 0, int(use.sum()))
        - 1.0
    )
    return harm, cost * float(use.sum())


def _cheapest(harm: FloatArray, cost: FloatArray) -> list[int]:
    """For each class the rule that costs least, all together no more harmful than rule 0 for all.

    Harm that is not finite is never taken.
    """
    bound = harm[:, 0].sum()
    harm = np.where(np.isfinite(harm), harm, np.inf)
    best = np.zeros(len(harm), np.int64)

    def total(chosen: npt.NDArray[np.int64], table: FloatArray) -> float:
        return float(table[np.arange(len(table)), chosen].sum())

    # Prices of harm from dear to cheap: the last choice that keeps the bound and costs least.
    span = max(float(np.abs(cost).max()), 1e-12) / max(abs(float(bound)), 1e-9)
    for price in np.geomspace(1e3, 1e-4, 200) * span:
        with np.errstate(invalid="ignore"):
            chosen = np.argmin(cost + price * harm, axis=1)
        if total(chosen, harm) <= bound and total(chosen, cost) < total(best, cost):
            best = chosen
    return [int(at) for at in best]
