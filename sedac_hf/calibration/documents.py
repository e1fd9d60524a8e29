"""Documents: the unit of calibration, and how they are kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """One exchangeable unit of text: a prompt and its continuation, as token ids.

    Attributes:
        ids: Token ids, shape ``[length]``.
        prompt_length: Exits act, and loss is counted, from this position on. 0 means that the
            whole text counts.
    """

    ids: IntArray
    prompt_length: int = 0
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        """Check the ids and take their hash."""
        ids = np.ascontiguousarray(self.ids, dtype=np.int64)
        if ids.ndim != 1 or ids.size < 2:
            raise CalibrationError(
                f"a document needs a flat array of at least 2 token ids, found shape {ids.shape}"
            )
        if not 0 <= self.prompt_length < ids.size:
            raise CalibrationError(
                f"prompt_length must lie in [0, {ids.size}), found {self.prompt_length}"
            )
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "hash", hashlib.sha256(ids.tobytes()).hexdigest()[:16])

    def __len__(self) -> int:
        """Number of tokens, prompt included."""
        return int(self.ids.size)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"ids": self.ids.tolist(), "prompt_length": self.prompt_length})

    @classmethod
    def from_json(cls, line: str) -> Document:
        """Inverse of `to_json`."""
        record: dict[str, Any] = json.loads(line)
        return cls(np.asarray(record["ids"], dtype=np.int64), int(record["prompt_length"]))


def append_documents(path: Path, documents: Iterable[Document]) -> None:
    """Append documents to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(document.to_json() + "\n" for document in documents)


def read_documents(path: Path) -> list[Document]:
    """Read a JSON-lines file; a last line cut off by an interruption is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Document.from_json(line) for line in lines[:-1] if line]


def encode_texts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 256,
    min_length: int = 16,
) -> Iterator[Document]:
    """Turn plain texts into documents of at most `max_length` tokens; shorter rests are dropped."""
    for text in texts:
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)
        if ids.size >= min_length:
            yield Document(ids[:max_length])


def split_documents(
    documents: Sequence[Document], shares: Sequence[float], *, seed: int
) -> list[list[Document]]:
    """Deal documents into disjoint splits at random.

    Equal documents always land in the same split, since membership is drawn per hash.

    Args:
        documents: What to deal.
        shares: Share of each split; they must add up to 1.
        seed: Seed of the draw.

    Returns:
        One list for each share.
    """
    if abs(sum(shares) - 1.0) > 1e-9 or min(shares) < 0:
        raise CalibrationError(f"shares must be >= 0 and add up to 1, found {list(shares)}")
    hashes = sorted({document.hash for document in documents})
    order = np.random.default_rng(seed).permutation(len(hashes))
    bounds = np.rint(np.cumsum(shares) * len(hashes)).astype(int)
    owner = {hashes[j]: int(np.searchsorted(bounds, i, "right")) for i, j in enumerate(order)}
    splits: list[list[Document]] = [[] for _ in shares]
    for document in documents:
        splits[owner[document.hash]].append(document)
    return splits


def batches_of(
    documents: Sequence[Document], rows: Sequence[int], tokens: int
) -> Iterator[list[int]]:
    """Cut documents into batches of at most `tokens` tokens, padding included, in order.

    Args:
        documents: The documents.
        rows: Indices of those that are wanted.
        tokens: Most tokens of a batch; a longer document is one of its own.

    Yields:
        Indices of documents.
    """
    group: list[int] = []
    longest = 0
    for i in rows:
        longest = max(longest, len(documents[i]))
        if group and longest * (len(group) + 1) > tokens:
            yield group
            group, longest = [], len(documents[i])
        group.append(i)
    if group:
        yield group
