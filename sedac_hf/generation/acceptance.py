"""Choosing tokens as the base alone would, and following drafts as long as they agree.

A token is always drawn from the base's own distribution at its place: the walk goes on to a child
only if the token that was drawn is that child's. So whatever was drafted, in whatever way, the text
has the base's distribution; drafts decide how far one verification carries, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

from sedac_hf.generation.draft_tree import NAMES, ROOT

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.generation.draft_tree import DraftTree
    from sedac_hf.generation.row_texts import RowTexts

__all__ = ["TokenChooser", "Walk", "processors_by_row", "walk"]

NameDraft = Callable[[int, int], str]
IntArray = npt.NDArray[np.int64]

# Processors of transformers that keep something between calls.
_STATEFUL = frozenset(
    {"UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor"}
)


# Those that touch nothing but the logits of end tokens, until a text is long enough.
_ONLY_ENDS = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)


def _least_length(processor: Any) -> int:
    """Tokens of a text, prompt included, from which on it may end."""
    if isinstance(processor, MinLengthLogitsProcessor):
        return int(processor.min_length)
    return int(processor.prompt_length_to_skip + processor.min_new_tokens)


def _ends_of(processor: Any) -> list[int]:
    """Tokens that such a processor holds back."""
    ends: list[int] = processor.eos_token_id.reshape(-1).tolist()
    return ends


def processors_by_row(processors: LogitsProcessorList) -> bool:
    """Whether processors may be asked about rows of a batch that differ in length.

    Those of transformers may, but for two; others say so by an attribute `by_row = True`.

    Args:
        processors: The logits processors of the call.
    """
    return all(
        getattr(each, "by_row", False) is True
        or (
            type(each).__module__ == logits_process.__name__
            and type(each).__name__ not in _STATEFUL
        )
        for each in processors
    )


class TokenChooser:
    """Draws the next token of some rows from the base's logits.

    The random numbers are those that transformers would draw at each step for the whole batch, so
    that a seed gives the text that it gives without drafts.
    """

    def __init__(self, processors: LogitsProcessorList, sample: bool, rows: int) -> None:
        """Work for one call of `generate`.

        Args:
            processors: The logits processors of the call, those of this package left out.
            sample: Whether to sample; else the most probable token is taken.
            rows: Rows of the batch.
        """
        self._processors = processors
        self._sample = sample
        self._rows = rows
        only_ends = all(type(each) in _ONLY_ENDS for each in processors)
        self._is_greedy = only_ends and not sample
        ends = list(processors) if self._is_greedy else []
        self._ends = {end for each in ends for end in _ends_of(each)}
        self._noise: dict[int, Tensor] = {}
        self._drawn = 0

    def takes_best(self, texts: RowTexts) -> bool:
        """Whether a token is the one with the largest logit where it `allows` it.

        Args:
            texts: The texts.
        """
        return self._is_greedy and not texts.wants_logits

    def allows(self, texts: RowTexts, row: int, token: int) -> bool:
        """Whether the processors leave a token's logit alone, where a chooser `takes_best`.

        Args:
            texts: The texts.
            row: The row.
            token: The token.
        """
        if token not in self._ends:
            return True
        return all(texts.length(row) >= _least_length(each) for each in self._processors)

    def least_lengths(self) -> list[tuple[int, list[int]]]:
        """Tokens that a text must have, prompt included, before it may be given some others.

        All that processors do where a chooser `takes_best`.
        """
        return [(_least_length(each), _ends_of(each)) for each in self._processors]

    def choose(
        self, texts: RowTexts, rows: Sequence[int], logits: Tensor, named: NameDraft | None = None
    ) -> list[int]:
        """Choose the next token of some rows, and append it.

        Args:
            texts: The texts so far.
            rows: Which rows.
            logits: The base's logits for them, `[len(rows), vocabulary]`.
            named: Says who had drafted a row's token; None for nobody.

        Returns:
            The tokens.
        """
        logits = logits.float()
        tokens = [0] * len(rows)
        lengths = texts.new[list(rows)]
        for length in np.unique(lengths):
            places = np.flatnonzero(lengths == length).tolist()
            own = [rows[place] for place in places]
            part = logits[places]
            # Processors may write into what they are given.
            scores = self._scored(texts, own, part.clone())
            drawn = self._draw(own, int(length), scores)
            for place, token in zip(places, drawn, strict=True):
                tokens[place] = token
            for i, place in enumerate(places):
                row, token = rows[place], tokens[place]
                origin = "base" if named is None else named(row, token)
                if texts.wants_logits:
                    texts.append(row, token, scores[i].clone(), part[i].clone(), origin)
                else:
                    texts.append(row, token, origin=origin)
        self._forget(int(texts.new[~texts.done].min()) if (~texts.done).any() else self._drawn)
        return tokens

    def _scored(self, texts: RowTexts, rows: Sequence[int], logits: Tensor) -> Tensor:
        """What the processors make of the logits of rows of one length."""
        if not len(self._processors):
            return logits
        # Some processors know each row of the batch by its place: rows of another length are
        # stood in for by one that is asked about.
        place = {row: at for at, row in enumerate(rows)}
        order = [place.get(row, 0) for row in range(self._rows)]
        prefix = torch.stack([texts.prefix(row) for row in rows])[order].to(logits.device)
        scores: Tensor = cast(Any, self._processors)(prefix, logits[order])
        return scores[list(rows)]

    def _draw(self, rows: Sequence[int], step: int, scores: Tensor) -> list[int]:
        if not self._sample:
            chosen: list[int] = scores.argmax(-1).tolist()
            return chosen
        while self._drawn <= step:
            # As torch.multinomial draws one sample: the largest of p / exponential noise.
            noise = torch.empty(
                (self._rows, scores.shape[-1]), dtype=torch.float32, device=scores.device
            )
            self._noise[self._drawn] = noise.exponential_(1)
            self._drawn += 1
        drawn: list[int] = (scores.softmax(-1) / self._noise[step][list(rows)]).argmax(-1).tolist()
        return drawn

    def _forget(self, step: int) -> None:
        """Let go of the random numbers of steps that every row has taken."""
        for past in [kept for kept in self._noise if kept < step]:
            del self._noise[past]


class Walk(NamedTuple):
    """How far each row went.

    Attributes:
        path: Nodes that stay, the root first, `[rows, most]`; zeros behind a row's own.
        counts: How many stay, `[rows]`; 0 for rows that had stopped before.
        roots: Each row's last token, `[rows]`.
    """

    path: IntArray
    counts: IntArray
    roots: IntArray


def walk(
    chooser: TokenChooser,
    texts: RowTexts,
    trees: Sequence[DraftTree],
    run: RowPass,
    final: Tensor,
) -> Walk:
    """Follow each tree as long as the token that the base gives is among the children.

    Args:
        chooser: Draws tokens.
        texts: The texts; they are appended to.
        trees: One tree per row.
        run: Says what words follow from states.
        final: The base's final-layer state of every node, `[rows, nodes, width]`.
    """
    rows = len(trees)
    # Sampling and processors need all logits; the core finds the largest by itself.
    best = run.best(final) if chooser.takes_best(texts) else None
    logits = run.logits(final) if best is None else final[..., :0]
    node = np.zeros(rows, np.int64)

    def named(row: int, token: int) -> str:
        child = trees[row].child(int(node[row]), token)
        return NAMES[ROOT if child is None else trees[row].origins[child]]

    paths: list[list[int]] = [[] for _ in range(rows)]
    roots = np.array([tree.tokens[0] for tree in trees], np.int64)
    going = [row for row in range(rows) if not texts.done[row]]
    while going:
        if best is not None:
            tokens, finite = (each[going, node[going]].tolist() for each in best)
            for place, row in enumerate(going):
                if chooser.allows(texts, row, tokens[place]):
                    texts.append(row, tokens[place], origin=named(row, tokens[place]))
                else:
                    at = run.logits(final[row : row + 1, int(node[row]) : int(node[row]) + 1])[:, 0]
                    [tokens[place]] = chooser.choose(texts, [row], at, named)
        else:
            at = logits[going, node[going].tolist()]
            finite = torch.isfinite(at.amax(-1)).tolist()
            tokens = chooser.choose(texts, going, at, named)
        still = []
        for row, token, is_finite in zip(going, tokens, finite, strict=True):
            paths[row].append(int(node[row]))
            roots[row] = token
            child = trees[row].child(int(node[row]), token)
            # Behind logits that are not numbers no draft is believed.
            if child is not None and is_finite and not texts.done[row]:
                node[row] = child
                still.append(row)
        going = still
    counts = np.array([len(path) for path in paths], np.int64)
    path = np.zeros((rows, max(1, int(counts.max()))), np.int64)
    for row, own in enumerate(paths):
        path[row, : len(own)] = own
    return Walk(path, counts, roots)
