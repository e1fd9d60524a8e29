"""Choose and certify thresholds anew for a model whose exit heads are trained."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.certify import certify
from sedac_hf.calibration.costs import CostModel
from sedac_hf.calibration.documents import Document, split_documents
from sedac_hf.calibration.drift import RiskHistograms
from sedac_hf.calibration.gate_stage import TracedSplit, fused_traces
from sedac_hf.calibration.measurement import collect_traces
from sedac_hf.calibration.policy_search import choose_policies
from sedac_hf.calibration.states import BaseStates
from sedac_hf.calibration.token_facts import TokenFacts, collect_facts
from sedac_hf.calibration.variants import Material, Variant, front_of
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.perplexity import as_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.calibration.certificate import Certificate
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.core.exit_heads import ExitHead
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["calibrate", "trace_documents"]


def calibrate(
    model: SedacForCausalLM,
    documents: Sequence[Document] | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target: RiskTarget | None = None,
    search_share: float = 0.3,
    held_out_share: float = 0.1,
    rungs: int = 8,
    costs: CostModel | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Certificate:
    """Choose thresholds for texts of one's own, certify them, and set the model to them.

    Documents are dealt into three disjoint parts: thresholds are searched on the first, certified
    on the second, checked on the third. Exit heads and probes stay as they are. When nothing passes
    the model's exits are off in certified mode afterwards. What is chosen are hard exits.

    Args:
        model: A wrapped model with exit heads, in the data type it will be used in.
        documents: Documents, or plain texts together with a tokenizer; none that heads or probes
            were trained on.
        tokenizer: Turns texts into documents.
        target: What is to be shown; None means 1 %, delta 0.1, clip 0.1 nats and tail 5 %.
        search_share: Share of the documents that thresholds are searched on.
        held_out_share: Share of the documents that the result is checked on.
        rungs: Most policies to walk.
        costs: What probes, tries and exits cost; None counts parameters.
        batch_tokens: Most tokens of one forward; None picks it from the vocabulary.
        seed: Seed of the deal and of the search.
        progress: Show progress bars.

    Returns:
        The certificate, which the model then holds.

    Raises:
        CalibrationError: If the model has no exit heads or there are too few documents.
    """
    if not len(model.exit_heads):
        raise CalibrationError(
            "the model has no exit heads, so there are no thresholds to choose; fit some with "
            "sedac_hf.fit."
        )
    target = target or RiskTarget()
    given = {d.hash: d for d in as_documents(documents, tokenizer)}
    shares = [search_share, held_out_share, 1.0 - search_share - held_out_share]
    search, held_out, fresh = split_documents(list(given.values()), shares, seed=seed)
    if not search or not fresh:
        raise CalibrationError(
            f"{len(given)} documents are too few to search on some and certify on others; give at "
            "least a hundred."
        )
    draft = model.draft_vocabulary
    if costs is None:
        costs = CostModel.from_base(
            model.base_lm,
            model.config.checkpoint_specs(),
            probe_rank=model.config.probe_rank,
            draft_vocabulary=0 if draft is None else len(draft),
        )
    traces, facts = _traced(model, search, progress=progress)
    own = Variant("as fitted").of(model.cascade) if model.cascade else Variant("plain")
    material = Material({own.fusion: traces}, facts, {own.fusion: costs}, model.gates.token_classes)
    policies = choose_policies(
        model,
        traces,
        search,
        costs,
        temperatures=_temperatures(model),
        epsilon=target.epsilon,
        rungs=rungs,
        seed=seed,
        batch_tokens=batch_tokens,
        front=front_of(own, material, seed=seed),
    )
    certificate = certify(
        model,
        fresh,
        policies,
        target=target,
        other_splits={"search": search},
        held_out=held_out,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    policy = certificate.policy
    model.set_cascade(policy.cascade if policy else None)
    model.certificate = certificate
    model.risk_histograms = RiskHistograms.from_traces(traces)
    return certificate


def trace_documents(
    model: SedacForCausalLM, documents: Sequence[Document], *, progress: bool = False
) -> Traces:
    """Traces of every possible exit on documents; the base's states are kept on disk meanwhile.

    Exits speak at the temperatures of the model's present rules, and risks are fused as those say.

    Args:
        model: A wrapped model with exit heads.
        documents: The documents.
        progress: Show a progress bar.

    Returns:
        The traces, in the order of the documents.
    """
    return _traced(model, documents, progress=progress)[0]


def _traced(
    model: SedacForCausalLM, documents: Sequence[Document], *, progress: bool
) -> tuple[Traces, TokenFacts]:
    """Traces by the model's present rules, and what else is known of the tokens."""
    heads = cast("list[ExitHead]", list(model.exit_heads))
    draft = model.draft_vocabulary
    if draft is None:
        draft = torch.arange(model.shell.vocabulary_size)
    width = int(model.config.get_text_config().hidden_size)
    with tempfile.TemporaryDirectory(prefix="sedac-") as folder:
        layers = [head.layer_idx for head in heads]
        states = BaseStates(Path(folder), documents, layers, width)
        states.record(model.shell, progress=progress)
        rows = range(len(documents))
        traces = collect_traces(
            heads, model.probes, model.shell, states, rows, draft, _temperatures(model)
        )
        facts = collect_facts(heads, model.shell, states, rows)
        kind = "none" if model.cascade is None else model.cascade.fusion
        if kind != "none" and model.gates.fusion is not None:
            split = TracedSplit(rows, traces, facts)
            traces = fused_traces(model.gates.fusion, kind, heads, model.probes, states, split)
        return traces, facts


def _temperatures(model: SedacForCausalLM) -> list[float] | None:
    """Temperatures of the exits, which belong to the heads and stay as they are."""
    return [layer.temperature for layer in model.cascade.layers] if model.cascade else None
