"""Disjoint splits of documents for the stages of `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sedac_hf.calibration.documents import Document, split_documents
from sedac_hf.errors import CalibrationError

_HELD_OUT = 0.06  # share of documents on which the deployed policy is looked at once more
# More documents than these would sharpen a choice or a bound by less than what they cost in time;
# of a large draw the rest goes to heads, which gain from all of it.
_MOST_CHOSEN_ON, _MOST_CERTIFIED, _MOST_HELD_OUT = 400, 480, 150


@dataclass(frozen=True)
class Splits:
    """Documents by purpose, as indices into one list."""

    documents: list[Document]
    train: list[int]
    probe: list[int]
    search: list[int]
    certify: list[int]
    held_out: list[int]

    def of(self, rows: Sequence[int]) -> list[Document]:
        """The documents at some indices."""
        return [self.documents[i] for i in rows]


def split_for_fit(documents: list[Document], seed: int, more: Sequence[Document] = ()) -> Splits:
    """Deal documents to heads, probes, search, certification and the check of what was certified.

    The last two stand at the list's end: nothing before certification may see them.

    Args:
        documents: All documents, none twice.
        seed: Seed of the deal.
        more: Further documents that only heads are trained on; those dealt already are left out.

    Returns:
        The splits.

    Raises:
        CalibrationError: If a split would be empty.
    """
    count = len(documents)
    certify = min(max(0.2, 240 / count), 0.4)
    chosen_on = min(0.12 * (1.0 - certify - _HELD_OUT), _MOST_CHOSEN_ON / count)
    certify = min(certify, _MOST_CERTIFIED / count)
    held_out = min(_HELD_OUT, _MOST_HELD_OUT / count)
    shares = [chosen_on, chosen_on, certify, held_out]
    parts = split_documents(documents, [1.0 - sum(shares), *shares], seed=seed)
    ordered = [document for part in parts for document in part]
    edges = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    spans = [list(range(a, b)) for a, b in pairwise(edges)]
    if min(map(len, spans)) == 0:
        raise CalibrationError(
            f"{len(documents)} documents are too few to split into five parts; give more texts"
        )
    known = {document.hash for document in ordered}
    extra = list({d.hash: d for d in more if d.hash not in known}.values())
    train, *others = ([at + len(extra) for at in span] for span in spans)
    return Splits([*extra, *ordered], [*range(len(extra)), *train], *others)
