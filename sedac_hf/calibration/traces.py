"""Traces: what calibration records per token about each possible exit."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from sedac_hf.errors import CalibrationError

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_PER_TOKEN = ("eligible", "nll_full")
_PER_EXIT = ("risk", "probability", "delta_nll", "divergence", "agree")


@dataclass(frozen=True)
class Traces:
    """One row for each predicted token of each document's continuation, T rows, K checkpoints.

    An exit is judged alone here: the tokens before it ran at full depth. What exits do to one
    another through the K/V cache is measured by the true forward, not by traces.

    Attributes:
        checkpoints: Layers of the checkpoints, K of them.
        doc_offsets: Rows of document d are ``doc_offsets[d]:doc_offsets[d + 1]``, ``[D + 1]``.
        eligible: Whether the token may leave (the last prompt position may not), ``[T]``.
        nll_full: Negative log-likelihood of the true token at full depth, nats, ``[T]``.
        risk: What the probe says, ``[T, K]``.
        probability: The exit's own probability of its first choice, ``[T, K]``.
        delta_nll: NLL of the exit less that of full depth, nats, ``[T, K]``.
        divergence: KL divergence of the exit from full depth, nats, ``[T, K]``.
        agree: Whether both have the same first choice, ``[T, K]``.
    """

    checkpoints: tuple[int, ...]
    doc_offsets: npt.NDArray[np.int64]
    eligible: BoolArray
    nll_full: FloatArray
    risk: FloatArray
    probability: FloatArray
    delta_nll: FloatArray
    divergence: FloatArray
    agree: BoolArray

    def __post_init__(self) -> None:
        """Check that the shapes belong together."""
        tokens, exits = len(self.nll_full), len(self.checkpoints)
        wrong = [n for n in _PER_TOKEN if getattr(self, n).shape != (tokens,)]
        wrong += [n for n in _PER_EXIT if getattr(self, n).shape != (tokens, exits)]
        offsets = self.doc_offsets
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != tokens:
            wrong.append("doc_offsets")
        if wrong:
            raise CalibrationError(
                f"traces of {tokens} tokens and {exits} checkpoints have {', '.join(wrong)} of "
                "another shape"
            )

    def of_documents(self, chosen: BoolArray) -> Traces:
        """The traces of some documents.

        Args:
            chosen: Which, ``[D]``.
        """
        lengths = np.diff(self.doc_offsets)
        rows = np.repeat(chosen, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        arrays = {name: getattr(self, name)[rows] for name in (*_PER_TOKEN, *_PER_EXIT)}
        return Traces(checkpoints=self.checkpoints, doc_offsets=offsets, **arrays)

    def save(self, path: Path) -> None:
        """Write the traces as safetensors."""
        arrays: dict[str, Any] = {
            f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)
        }
        arrays["checkpoints"] = np.asarray(self.checkpoints, dtype=np.int64)
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path) -> Traces:
        """Inverse of `save`.

        Raises:
            CalibrationError: If the file holds something else.
        """
        arrays = load_file(path)
        missing = sorted({f.name for f in fields(cls)} - arrays.keys())
        if missing:
            raise CalibrationError(f"{path} is no file of traces: it lacks {', '.join(missing)}")
        checkpoints = tuple(int(layer) for layer in arrays.pop("checkpoints"))
        return cls(checkpoints=checkpoints, **arrays)
