"""Score documents under many cascades whose exits are settled: the base runs once for all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.calibration.work_sizes import most_logits
from sedac_hf.core.recorded_pass import RecordedPass
from sedac_hf.core.simulate import eligible_positions, settled_states
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import (
    DocumentScores,
    length_batches,
    padded,
    score_documents,
)
from sedac_hf.generation.logits_processor import scale_exits

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.session import StepRecord
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["score_policies"]

# Floats of recorded states held at once: 256 MB in float32.
_MAX_STATES = 1 << 26


def score_policies(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    cascades: Sequence[CascadeConfig | None],
    *,
    batch_tokens: int | None = None,
) -> list[DocumentScores]:
    """Score the same documents under each of several cascades.

    Where exits are settled, K/V do not depend on them: one forward of the base serves every
    cascade, and only exit heads are run again. With `propagate`, and with soft exits, each cascade
    has its own forwards.

    Args:
        model: The wrapped model.
        documents: Token ids with their prompt lengths.
        cascades: Thresholds; None is full depth.
        batch_tokens: Most tokens of one forward, padding included; None picks it.

    Returns:
        Scores in the order of the cascades, each in the order of the documents.

    Raises:
        CalibrationError: If there are no documents.
    """
    if not documents:
        raise CalibrationError("there are no documents to score; pass at least one.")
    apart = {
        i: score_documents(model, documents, cascade, batch_tokens=batch_tokens)
        for i, cascade in enumerate(cascades)
        if model.config.kv_mode != "settle" or (cascade is not None and cascade.is_soft)
    }
    if len(apart) == len(cascades):
        return [apart[i] for i in range(len(cascades))]
    model.assembly.prepare()
    parts = model.assembly.parts
    width = int(model.config.get_text_config().hidden_size)
    budget = batch_tokens or max(1, _MAX_STATES // (width * (len(parts.heads) + 2)))
    tables = {
        i: _Table(len(documents), parts.shell.num_layers)
        for i in range(len(cascades))
        if i not in apart
    }
    asked = [model.assembly.controller(c) for i in tables if (c := cascades[i]) is not None]
    attentive = {k for controller in asked for k in controller.attentive}
    with torch.inference_mode():
        for group in length_batches(documents, budget):
            batch = _Batch(model, parts, [documents[i] for i in group], attentive)
            for i, table in tables.items():
                batch.score(cascades[i], table, group)
    scores = apart | {i: table.scores() for i, table in tables.items()}
    return [scores[i] for i in range(len(cascades))]


class _Table:
    """Scores that fill up batch by batch."""

    def __init__(self, documents: int, depth: int) -> None:
        self.nll = np.zeros(documents)
        self.tokens = np.zeros(documents, np.int64)
        self.steps = np.zeros(documents, np.int64)
        self.exits = np.zeros((documents, depth + 1), np.int64)

    def scores(self) -> DocumentScores:
        return DocumentScores(self.nll, self.tokens, self.steps, self.exits)


class _Batch:
    """Some documents with everything the base says about them."""

    def __init__(
        self,
        model: SedacForCausalLM,
        parts: ExitParts,
        documents: Sequence[Document],
        attentive: Collection[int],
    ) -> None:
        self._model = model
        self._parts = parts
        self._lengths = [len(d) for d in documents]
        self._first = [max(d.prompt_length, 1) for d in documents]
        ids, mask = padded(documents)
        device = model.device
        self._arguments = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        self._eligible = eligible_positions(
            (ids.shape[0], ids.shape[1]), torch.tensor(self._first), mask
        )
        # Position p predicts token p + 1; the first scored token is the first after the prompt.
        at = np.arange(ids.shape[1])[None, :]
        self._scored = (at >= np.array(self._first)[:, None] - 1) & (
            at < np.array(self._lengths)[:, None] - 1
        )
        self._targets = ids.roll(-1, 1).to(device)
        self._recorded = RecordedPass.record(parts, self._arguments, attentive)
        self._full = np.zeros(ids.shape)
        self._full[self._scored] = self._nll(self._recorded.final, self._scored)

    def score(self, cascade: CascadeConfig | None, table: _Table, group: Sequence[int]) -> None:
        """Fill in the rows of `group` under one cascade."""
        nll, depth = self._full, self._parts.shell.num_layers
        layers = np.full(nll.shape, depth, np.int64)
        if cascade is not None:
            controller = self._model.assembly.controller(cascade)
            trace, states = settled_states(
                self._parts, controller, self._recorded, self._arguments, self._eligible
            )
            left = self._scored & (trace.checkpoints >= 0)
            nll, layers = nll.copy(), trace.layers
            temperatures = [layer.temperature for layer in cascade.layers]
            nll[left] = self._nll(states, left, trace, temperatures)
        for row, i in enumerate(group):
            first, length = self._first[row], self._lengths[row]
            table.nll[i] = nll[row, first - 1 : length - 1].sum()
            table.tokens[i] = length - first
            table.steps[i] = max(0, length - 1 - first)
            ran = np.minimum(layers[row, first : length - 1] + 1, depth)
            table.exits[i] = np.bincount(ran, minlength=depth + 1)

    def _nll(
        self,
        states: Tensor,
        chosen: npt.NDArray[np.bool_],
        trace: StepRecord | None = None,
        temperatures: Sequence[float] = (),
    ) -> npt.NDArray[np.float64]:
        """NLL of the next token at the chosen positions, in their order."""
        shell = self._parts.shell
        where = torch.from_numpy(chosen)
        picked, targets = states[where.to(states.device)], self._targets[where.to(states.device)]
        checkpoints = None if trace is None else trace.checkpoints[chosen]
        size = max(1, most_logits(states.device) // shell.vocabulary_size)
        found = [np.zeros(0)]
        for start in range(0, len(picked), size):
            part = slice(start, start + size)
            logits = shell.logits(picked[part].unsqueeze(0)).squeeze(0).float()
            if checkpoints is not None:
                logits = scale_exits(logits, checkpoints[part], temperatures)
            loss = functional.cross_entropy(logits, targets[part], reduction="none")
            found.append(loss.double().cpu().numpy())
        return np.concatenate(found)
