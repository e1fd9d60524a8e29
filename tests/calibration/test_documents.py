"""Documents: identity, storage, and disjoint splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sedac_hf.calibration.documents import (
    Document,
    append_documents,
    read_documents,
    split_documents,
)
from sedac_hf.calibration.fit_splits import split_for_fit
from sedac_hf.errors import CalibrationError


def numbered(count: int) -> list[Document]:
    """Documents that all differ."""
    return [Document(np.array([i, i + 1, 7]), 1) for i in range(count)]


def test_hash_follows_the_ids_alone() -> None:
    assert Document(np.array([1, 2, 3])).hash == Document(np.array([1, 2, 3]), 1).hash
    assert Document(np.array([1, 2, 3])).hash != Document(np.array([1, 2, 4])).hash


@pytest.mark.parametrize(("ids", "prompt"), [([1], 0), ([[1, 2]], 0), ([1, 2], 2), ([1, 2], -1)])
def test_what_is_no_document_is_refused(ids: list[int], prompt: int) -> None:
    with pytest.raises(CalibrationError):
        Document(np.array(ids), prompt)


def test_a_file_cut_off_in_a_line_keeps_the_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    documents = numbered(3)
    append_documents(path, documents)
    path.write_text(path.read_text()[:-5])
    assert [d.hash for d in read_documents(path)] == [d.hash for d in documents[:2]]
    assert read_documents(path)[0].prompt_length == 1


def test_splits_are_disjoint_and_keep_equal_documents_together() -> None:
    documents = numbered(50) + numbered(50)
    parts = split_documents(documents, [0.5, 0.3, 0.2], seed=3)
    hashes = [{d.hash for d in part} for part in parts]
    assert sum(map(len, hashes)) == 50
    assert not hashes[0] & hashes[1]
    assert not hashes[0] & hashes[2]
    assert not hashes[1] & hashes[2]
    assert [len(h) for h in hashes] == [25, 15, 10]
    assert sum(map(len, parts)) == 100
    again = split_documents(documents[::-1], [0.5, 0.3, 0.2], seed=3)
    assert [{d.hash for d in part} for part in again] == hashes


def test_shares_must_add_up() -> None:
    with pytest.raises(CalibrationError, match="add up to 1"):
        split_documents(numbered(4), [0.5, 0.4], seed=0)


def test_fit_keeps_certification_and_held_out_documents_behind_all_others() -> None:
    splits = split_for_fit(numbered(200), seed=1)
    assert splits.train[0] == 0
    assert splits.certify == list(range(splits.certify[0], splits.held_out[0]))
    assert splits.held_out == list(range(splits.held_out[0], 200))
    assert splits.certify[0] == splits.search[-1] + 1
    assert len(splits.certify) == 80
    with pytest.raises(CalibrationError, match="too few"):
        split_for_fit(numbered(3), seed=1)


def test_most_of_a_large_draw_goes_to_heads() -> None:
    splits = split_for_fit(numbered(20_000), seed=1)
    assert len(splits.probe) == len(splits.search) == 400
    assert len(splits.certify) == 480
    assert len(splits.held_out) == 150
    assert len(splits.train) == 20_000 - 2 * 400 - 480 - 150
