"""Score documents under a model: NLL per document, exits by layer, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.calibration.documents import batches_of
from sedac_hf.calibration.work_sizes import most_logits
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.modeling import SedacForCausalLM

__all__ = [
    "DocumentScores",
    "document_deltas",
    "length_batches",
    "padded",
    "score_documents",
    "split_hash",
]

# Logits of one forward are not turned to float32 at once and may be so many times more.
_WHOLE = 4
# Rows of logits that are turned to float32 at a time.
_NLL_ROWS = 256


@dataclass(frozen=True)
class DocumentScores:
    """What a model says of D documents.

    Attributes:
        nll: Sum of the NLL over the scored tokens, in nats, shape `[D]`; not finite where the model
            gave a NaN or infinite NLL.
        tokens: Scored tokens, shape `[D]`: those after the prompt, less the very first of the text.
        steps: Scored tokens that a decode step (where exits act) predicts, shape `[D]`. The first
            token after a prompt is predicted by the prompt's own pass.
        exits: Decode steps by the number of layers that they ran, shape `[D, layers + 1]`.
        soft_exits: Decode steps that ran later layers on fewer channels, shape `[D]`; None without
            soft exits.
        narrowed: Sum over the decode steps of the share of all MLPs' channels left out, shape
            `[D]`; None without soft exits.
    """

    nll: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    exits: npt.NDArray[np.int64]
    soft_exits: npt.NDArray[np.int64] | None = None
    narrowed: npt.NDArray[np.float64] | None = None

    @property
    def mean_nll(self) -> npt.NDArray[np.float64]:
        """Mean NLL per scored token of each document, shape `[D]`, NaN where none is scored."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.nll / self.tokens, dtype=np.float64)

    @property
    def exit_share(self) -> float:
        """Share of the decode steps that left early, 0 when there are none."""
        total = int(self.exits.sum())
        return float(self.exits[:, :-1].sum() / total) if total else 0.0

    @property
    def mean_depth(self) -> float:
        """Mean number of layers that a decode step ran, all of them when there are no steps."""
        layers = np.arange(self.exits.shape[1])
        total = int(self.exits.sum())
        return float(self.exits.sum(axis=0) @ layers / total) if total else float(layers[-1])

    @property
    def soft_exit_share(self) -> float:
        """Share of the decode steps that ran later layers on fewer channels."""
        total = int(self.exits.sum())
        return 0.0 if self.soft_exits is None or not total else float(self.soft_exits.sum() / total)

    @property
    def mean_kept_share(self) -> float:
        """Share of all MLPs' channels that a decode step ran on average; 1 without soft exits."""
        total = int(self.exits.sum())
        return 1.0 if self.narrowed is None or not total else float(1 - self.narrowed.sum() / total)

    def selected(self, index: npt.NDArray[np.intp]) -> DocumentScores:
        """The scores of the documents at `index`, in its order."""
        return DocumentScores(
            self.nll[index], self.tokens[index], self.steps[index], self.exits[index],
            None if self.soft_exits is None else self.soft_exits[index],
            None if self.narrowed is None else self.narrowed[index],
        )  # fmt: skip


def score_documents(
    model: SedacForCausalLM,
    documents: Sequence[Document],
    cascade: CascadeConfig | None = None,
    *,
    exits: str | None = None,
    batch_tokens: int | None = None,
) -> DocumentScores:
    """Run documents through the model and sum up their NLL.

    With exits the whole text is one masked forward in which every position after the prompt follows
    the rule of decoding, K/V of exited tokens included: the NLL is that of the generating model.

    Args:
        model: The wrapped model.
        documents: Token ids with their prompt lengths.
        cascade: Thresholds to use in place of the model's own.
        exits: `"off"` or `"simulate"`; None simulates when a cascade is given.
        batch_tokens: Most tokens of one forward, padding included (a longer document runs alone);
            None picks it from the vocabulary.

    Returns:
        Scores in the order of the documents.

    Raises:
        CalibrationError: If there are no documents.
    """
    if not documents:
        raise CalibrationError("there are no documents to score; pass at least one.")
    how = exits or ("off" if cascade is None else "simulate")
    text_config = model.config.get_text_config()
    depth, words = int(text_config.num_hidden_layers), int(text_config.vocab_size)
    budget = batch_tokens or max(1, _WHOLE * most_logits(model.device) // words)
    size = len(documents)
    nll, tokens, steps = np.zeros(size), np.zeros(size, np.int64), np.zeros(size, np.int64)
    counts = np.zeros((size, depth + 1), np.int64)
    soft, narrowed = np.zeros(size, np.int64), np.zeros(size)
    with torch.inference_mode(), model.cascade_replaced(cascade):
        for group in length_batches(documents, budget):
            start = [max(documents[i].prompt_length, 1) for i in group]
            out, layers = _forward(model, [documents[i] for i in group], start, how, depth)
            for row, i in enumerate(group):
                ids = torch.from_numpy(documents[i].ids)
                length, first = len(ids), start[row]
                nll[i] = _nll(out.logits[row, first - 1 : length - 1], ids[first:])
                tokens[i] = length - first
                # Position `first` is the first that a decode step runs on; the last has no target.
                steps[i] = max(0, length - 1 - first)
                left = layers[row, first : length - 1]
                ran = np.where(left < depth, left + 1, depth)
                counts[i] = np.bincount(ran, minlength=depth + 1)
                if (kept := getattr(out, "kept_shares", None)) is not None:
                    narrowed[i] = float((1 - kept[row, first : length - 1].double()).sum())
                    soft[i] = int((out.soft_exits[row, first : length - 1] >= 0).sum())
            del out
    return DocumentScores(nll, tokens, steps, counts, soft, narrowed)


def document_deltas(full: DocumentScores, exited: DocumentScores) -> npt.NDArray[np.float64]:
    """Rise of the mean NLL per token of each document.

    Args:
        full: Scores at full depth.
        exited: Scores of the same documents with exits.

    Returns:
        Differences in nats, shape `[D]`. NaN where nothing can exit or the base's own NLL is not
        finite; infinite where exits alone made it so, since that must never look harmless.
    """
    base, other = full.mean_nll, exited.mean_nll
    usable = (full.steps > 0) & np.isfinite(base)
    with np.errstate(invalid="ignore"):
        delta = np.where(np.isfinite(other), other - base, np.inf)
    return np.asarray(np.where(usable, delta, np.nan), dtype=np.float64)


def split_hash(documents: Sequence[Document]) -> str:
    """A hash of a set of documents, whatever their order: 16 hexadecimal digits."""
    digest = hashlib.sha256("\n".join(sorted(d.hash for d in documents)).encode())
    return digest.hexdigest()[:16]


def padded(documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of documents, padded on the right, `[rows, width]` each."""
    ids = torch.zeros(len(documents), max(len(d) for d in documents), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document.ids)
        mask[row, : len(document)] = 1
    return ids, mask


def length_batches(documents: Sequence[Document], budget: int) -> Iterator[list[int]]:
    """Groups of documents of similar length whose padded size stays within the budget."""
    order = sorted(range(len(documents)), key=lambda i: (-len(documents[i]), documents[i].hash))
    return batches_of(documents, order, budget)


def _forward(
    model: SedacForCausalLM, documents: Sequence[Document], start: list[int], how: str, depth: int
) -> tuple[Any, npt.NDArray[np.int64]]:
    """Output and exit layers `[rows, width]` of right-padded rows."""
    ids, mask = padded(documents)
    device = model.device
    out = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=False,
        exits=how,
        exit_start=torch.tensor(start, device=device) if how == "simulate" else None,
    )
    layers = np.full(ids.shape, depth, dtype=np.int64)
    if how == "simulate":
        layers = out.exit_layers.cpu().numpy().astype(np.int64)
    return out, layers


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Sum of the NLL, float32 per token and float64 in sum, a few rows at a time."""
    total = 0.0
    targets = targets.to(logits.device)
    for at in range(0, len(targets), _NLL_ROWS):
        part = slice(at, at + _NLL_ROWS)
        losses = functional.cross_entropy(logits[part].float(), targets[part], reduction="none")
        total += float(losses.double().sum())
    return total
