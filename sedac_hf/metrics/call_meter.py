"""What one call of a model reports to a collector, one hand-over per step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from sedac_hf._core import TensorBuffer

if TYPE_CHECKING:
    from torch import Tensor

    from sedac_hf._core import AsyncBatchProcessor
    from sedac_hf.core.session import StepRecord

__all__ = ["MODES", "SOURCES", "CallMeter"]

# As in `sedac_hf.config`, which is not imported here because it needs transformers.
MODES: Final = ("off", "plain", "certified", "exact")
# Who may have drafted a token; `origins` of a draft tree are places in it.
SOURCES: Final = ("base", "head", "lookup")

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class CallMeter:
    """Belongs to one call, as its session does, and so needs no lock.

    Arrays of records are handed over as they are, without a copy, and are read-only from then on.

    Attributes:
        live: Whether tokens are reported as they come. Where they are not (beams, assistants), the
            call reports them at its end.
    """

    def __init__(
        self,
        processor: AsyncBatchProcessor,
        mode: int,
        depth: int,
        layers: Sequence[int],
        thresholds: Sequence[float],
    ) -> None:
        """Start the call's clock.

        Args:
            processor: Takes what is reported.
            mode: Index of the call's mode.
            depth: Layers of the base.
            layers: Layer of each checkpoint.
            thresholds: Threshold of each.
        """
        self.live = False
        self._processor = processor
        self._mode = mode
        self._depth = depth
        self._places = np.array(layers, np.int64)
        self._layers = TensorBuffer(self._places)
        self._thresholds = TensorBuffer(np.array(thresholds, np.float32))
        self._first = True
        self._held: tuple[StepRecord, float] | None = None
        self._begun = self._last = time.perf_counter()

    def step(self, record: StepRecord, tokens: IntArray, rows: Mask) -> None:
        """Report a step whose tokens have been chosen.

        Args:
            record: What was decided; not written to any more.
            tokens: The tokens, `[rows]`; not written to any more.
            rows: Rows that were given one, `[rows]`; likewise.
        """
        self._send(record, tokens, rows, self._lap())

    def hold(self, record: StepRecord) -> None:
        """Keep a step whose tokens are not chosen yet.

        Args:
            record: What was decided; not written to any more.
        """
        self._held = (record, self._lap())

    def release(self, tokens: Tensor, rows: Mask) -> None:
        """Report the step that is held, if any.

        Args:
            tokens: Its tokens, `[rows]`.
            rows: Rows whose text they belong to, `[rows]`.
        """
        if self._held is not None:
            (record, seconds), self._held = self._held, None
            self._send(record, tokens.numpy(force=True).astype(np.int64), rows.copy(), seconds)

    def alone(self, record: StepRecord) -> None:
        """Report a decode step outside of `generate`; who made it knows the tokens.

        Args:
            record: What was decided; not written to any more.
        """
        self._first = False
        rows = len(record.layers)
        self._send(record, np.full(rows, -1, np.int64), np.ones(rows, np.bool_), self._lap())

    def afterwards(self, records: Sequence[StepRecord], new: IntArray, real: Mask | None) -> None:
        """Report all steps of a call at its end; each took its share of the time.

        Args:
            records: What was decided, step by step.
            new: New tokens, `[rows, steps]`, where they are those of the records.
            real: Which of them count; None if the records' rows are others, and all count.
        """
        seconds = self._lap() / max(len(records), 1)
        self._first = False
        for step, record in enumerate(records):
            rows = len(record.layers)
            if real is None:
                tokens, counts = np.full(rows, -1, np.int64), np.ones(rows, np.bool_)
            else:
                tokens, counts = new[:, step].copy(), real[:, step].copy()
            self._send(record, tokens, counts, seconds)

    def gained(
        self,
        tokens: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]],
        drafts: int | None = None,
    ) -> None:
        """Report what rows gained at full depth; a row's time is shared out among its tokens.

        Args:
            tokens: Each row's new tokens.
            sources: Who had drafted each, as `origins` of a draft tree.
            drafts: Drafts that were verified for it; None where there was no verification.
        """
        lap = self._lap()
        seconds = [lap / len(own) for own in tokens for _ in own]
        if not seconds:
            return
        self._processor.submit(
            self._mode,
            self._depth,
            self._takes_first(),
            TensorBuffer(np.array([token for own in tokens for token in own], np.int64)),
            TensorBuffer(np.array(seconds, np.float32)),
            sources=TensorBuffer(np.array([one for own in sources for one in own], np.uint8)),
            passes=0 if drafts is None else 1,
            drafts=drafts or 0,
        )

    def all_at_once(self, new: IntArray, real: Mask) -> None:
        """Report a call that ran as the base, of which only the result is known.

        Args:
            new: New tokens, `[rows, steps]`.
            real: Which of them belong to their rows' texts, same shape.
        """
        lap = self._lap()
        tokens = new[real]
        if not len(tokens):
            return
        self._processor.submit(
            self._mode,
            self._depth,
            False,
            TensorBuffer(tokens),
            TensorBuffer(np.full(len(tokens), lap / new.shape[1], np.float32)),
        )

    def event(self, name: str) -> None:
        """Count something that happened in this call.

        Args:
            name: What it is.
        """
        self._processor.submit_occurrence(name)

    def end(self) -> None:
        """Count the call and its time."""
        self._processor.submit_call(self._mode, time.perf_counter() - self._begun)

    def _lap(self) -> float:
        """Seconds since the last step, or the beginning."""
        now = time.perf_counter()
        taken, self._last = now - self._last, now
        return taken

    def _takes_first(self) -> bool:
        first, self._first = self._first, False
        return first

    def _send(self, record: StepRecord, tokens: IntArray, rows: Mask, seconds: float) -> None:
        checkpoints: list[TensorBuffer | None] | None = None
        if record.risks.shape[1]:
            left, skipped = self._left(record)
            checkpoints = [
                self._layers,
                self._thresholds,
                TensorBuffer(left),
                TensorBuffer(record.risks),
                TensorBuffer(record.confidences),
                TensorBuffer(record.tries),
                None if skipped is None else TensorBuffer(skipped),
            ]
        self._processor.submit(
            self._mode,
            self._depth,
            self._takes_first(),
            TensorBuffer(tokens),
            TensorBuffer(np.full(len(tokens), seconds, np.float32)),
            counts=TensorBuffer(rows),
            checkpoints=checkpoints,
        )

    def _left(self, record: StepRecord) -> tuple[IntArray, npt.NDArray[np.float32] | None]:
        """Checkpoint of each row's exit, hard or soft, and the share of the rest that it skipped.

        None is all of it. Of a soft exit it is the share of the channels behind the checkpoint.
        """
        soft, kept = record.soft_exits, record.kept
        if soft is None or kept is None:
            return record.checkpoints, None
        # A row without an exit has index -1; its share is not looked at.
        behind = np.maximum(self._depth - 1 - self._places[soft], 1)
        return soft, np.asarray((1.0 - kept) * self._depth / behind, np.float32)
