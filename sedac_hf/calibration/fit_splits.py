"""Disjoint splits of documents for the stages of `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sedac_hf.calibration.documents import Document, split_documents
from sedac_hf.errors import CalibrationError


@dataclass(frozen=True)
class Splits:
    """Documents by purpose, as indices into one list."""

    documents: list[Document]
    train: list[int]
    probe: list[int]
    search: list[int]
    certify: list[int]

    def of(self, rows: Sequence[int]) -> list[Document]:
        """The documents at some indices."""
        return [self.documents[i] for i in rows]


def split_for_fit(documents: list[Document], seed: int) -> Splits:
    """Deal documents to heads, probes, search and certification, the last at the list's end."""
    certify_share = min(max(0.2, 240 / len(documents)), 0.4)
    rest = 1.0 - certify_share
    shares = [0.76 * rest, 0.12 * rest, 0.12 * rest, certify_share]
    parts = split_documents(documents, [*shares[:3], 1.0 - sum(shares[:3])], seed=seed)
    ordered = [document for part in parts for document in part]
    edges = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    spans = [list(range(a, b)) for a, b in pairwise(edges)]
    if min(map(len, spans)) == 0:
        raise CalibrationError(
            f"{len(documents)} documents are too few to split into four parts; give more texts"
        )
    return Splits(ordered, *spans)
