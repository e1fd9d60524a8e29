"""State of one call of `generate` or `forward`, kept out of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sedac_hf.core.row_history import RowHistory

if TYPE_CHECKING:
    from torch import Tensor

    from sedac_hf.core.cascade_controller import CascadeController
    from sedac_hf.core.draft_stats import DraftStats
    from sedac_hf.core.observers import ExitWatch, StepObserver
    from sedac_hf.core.prompt_reader import PromptReader
    from sedac_hf.metrics.call_meter import CallMeter

__all__ = ["ExitSession", "StepRecord", "active_session", "session_scope"]


FloatArray = npt.NDArray[np.float32]


@dataclass
class StepRecord:
    """What one forward decided for each row.

    Attributes:
        layers: Layer each row left after, `[rows]`; the number of layers where it did not leave.
        checkpoints: Index of the checkpoint each row left at, `[rows]`; -1 where it did not.
        risks: Risk at each checkpoint, `[rows, checkpoints]`; NaN where a row did not come.
        confidences: Normalised confidence there, same shape.
        probabilities: Largest probability of the exit there, same shape; NaN where it was not
            asked.
        tries: Whether the exit head was tried there, same shape.
        soft_exits: Index of the checkpoint behind which each row ran on fewer channels, `[rows]`;
            -1 where it did not. None without soft exits. Such a row has left nowhere.
        kept: Share of all MLPs' channels that each row ran, `[rows]`; None without soft exits.
    """

    layers: npt.NDArray[np.int64]
    checkpoints: npt.NDArray[np.int64]
    risks: FloatArray
    confidences: FloatArray
    probabilities: FloatArray
    tries: npt.NDArray[np.bool_]
    soft_exits: npt.NDArray[np.int64] | None = None
    kept: FloatArray | None = None

    @classmethod
    def full_depth(cls, rows: int, num_layers: int, num_checkpoints: int) -> StepRecord:
        """The record of a forward in which no row could leave."""
        return cls(
            layers=np.full(rows, num_layers, np.int64),
            checkpoints=np.full(rows, -1, np.int64),
            risks=np.full((rows, num_checkpoints), np.nan, np.float32),
            confidences=np.full((rows, num_checkpoints), np.nan, np.float32),
            probabilities=np.full((rows, num_checkpoints), np.nan, np.float32),
            tries=np.zeros((rows, num_checkpoints), np.bool_),
        )

    @property
    def risk(self) -> FloatArray:
        """Risk at the last checkpoint a row came to, `[rows]`; NaN if it came to none."""
        return _last_known(self.risks)

    @property
    def confidence(self) -> FloatArray:
        """Normalised confidence there, `[rows]`; NaN if it came to none."""
        return _last_known(self.confidences)


def _last_known(values: FloatArray) -> FloatArray:
    """The last value of each row that is not NaN."""
    found = np.full(len(values), np.nan, np.float32)
    for column in values.T:
        found = np.where(np.isnan(column), found, column)
    return found


@dataclass
class ExitSession:
    """One call of `generate` (or a single forward outside of it).

    Attributes:
        owner: The model whose call this is; a call of another model inside it has its own.
        mode: The mode of the call.
        cascade: Decides who leaves; None when nobody may.
        drafts: Whether exits draft in this call, so that their heads must follow the prompt.
        records: One record per generated token, in order.
        pending: Record of the last forward, until the logits processor commits it.
        cache: The cache that was last looked at.
        in_step: Whether the exit heads have K/V of every position in that cache.
        prompt_length: Positions before the first generated token; None until it is known.
        eos_tokens: Ids that end a row, or None.
        settles: Whether the tail of an exited token is run later, so that K/V are the base's own.
        tails: Tails run for settled exits, row by row, each for one token or several.
        reader: Reads the prompt in place of the base's forward while it is being read; None for the
            forward itself.
        drafted: Figures of a call in exact mode, None in other modes.
        origins: Where each token of the first row came from: `"head"` or `"lookup"` for an accepted
            draft, else `"base"`. Exact mode only.
        meter: Reports the call to a collector, None without one.
        observers: Told of every step; the watch among them.
        watch: Says which rules act and which exits are held against full depth; None for nobody.
        live: Rows whose text went on at the last commit, `[rows]`; None for all.
        history: How hard each row's text has been; None until it is known, and where rules do not
            follow it.
        keeps_rows: Whether a row stays the same text from step to step; beams do not.
    """

    owner: object
    mode: str
    cascade: CascadeController | None = None
    drafts: bool = False
    records: list[StepRecord] = field(default_factory=list)
    pending: StepRecord | None = None
    cache: object = None
    in_step: bool = False
    prompt_length: int | None = None
    eos_tokens: Tensor | None = None
    settles: bool = False
    tails: int = 0
    reader: PromptReader | None = None
    drafted: DraftStats | None = None
    origins: list[str] = field(default_factory=list)
    meter: CallMeter | None = None
    observers: tuple[StepObserver, ...] = ()
    watch: ExitWatch | None = None
    live: npt.NDArray[np.bool_] | None = None
    history: RowHistory | None = None
    keeps_rows: bool = True

    @property
    def on_pass(self) -> bool:
        """Whether the call can be decoded by loops over a pass of its own."""
        return self.mode in ("exact", "plain") or (
            self.cascade is not None and (self.settles or self.is_soft)
        )

    @property
    def is_soft(self) -> bool:
        """Whether exits run the later layers on fewer channels."""
        return self.cascade is not None and self.cascade.config.is_soft

    def commit(
        self,
        rows: int,
        num_layers: int,
        num_checkpoints: int,
        live: npt.NDArray[np.bool_] | None = None,
    ) -> StepRecord:
        """Take the pending record into the list, and tell the observers.

        Args:
            rows: Rows whose next token is being chosen.
            num_layers: Decoder layers of the base.
            num_checkpoints: Checkpoints of the model.
            live: Rows whose text goes on, `[rows]`; None for all.

        Returns:
            The record; a full-depth one if the forward left none.
        """
        record = self.pending
        self.pending = None
        if record is None or len(record.layers) != rows:
            record = StepRecord.full_depth(rows, num_layers, num_checkpoints)
        self.records.append(record)
        self.live = live
        self.tell(record)
        return record

    def tell(self, record: StepRecord) -> None:
        """Show a step to the observers, and take up the rules that follow from it."""
        for observer in self.observers:
            observer.observe(record, self.live)
        if self.watch is not None and self.cascade is not None:
            self.cascade = self.watch.cascade

    @property
    def follows_entropy(self) -> bool:
        """Whether the rules follow the entropy of full depth, so that its logits are wanted."""
        return self.cascade is not None and self.cascade.config.adaptive_decay is not None

    def note(
        self, record: StepRecord, logits: Tensor, rows: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Let the history see what a step said, where the rules follow it.

        Args:
            record: What the step decided.
            logits: The logits of full depth where rows went there, `[rows, vocabulary]`.
            rows: Rows that are meant, `[rows]`; None for all.
        """
        rule = None if self.cascade is None else self.cascade.config.adaptive_decay
        if rule is None or not self.keeps_rows:
            return
        if self.history is None or self.history.rows != logits.shape[0]:
            self.history = RowHistory(rule, logits.shape[0])
        self.history.observe(record, logits, rows)

    def history_of(self, rows: int) -> RowHistory | None:
        """The history of a batch of `rows` rows, if it is known."""
        history = self.history
        return history if history is not None and history.rows == rows else None

    def end(self) -> None:
        """Tell the observers that the call is over."""
        for observer in self.observers:
            observer.end()


_ACTIVE: ContextVar[ExitSession | None] = ContextVar("sedac_session", default=None)


def active_session(owner: object) -> ExitSession | None:
    """The session of the running call of `owner`, or None outside of one.

    Args:
        owner: The model that asks.
    """
    session = _ACTIVE.get()
    return session if session is not None and session.owner is owner else None


@contextmanager
def session_scope(session: ExitSession | None) -> Iterator[None]:
    """Make `session` the active one in this thread of control; its observers learn of the end."""
    token = _ACTIVE.set(session)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        if session is not None:
            session.end()
