"""State of one call of `generate` or `forward`, kept out of the model, and the running totals."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.core.draft_stats import DraftStats
from sedac_hf.core.row_history import RowHistory

if TYPE_CHECKING:
    from torch import Tensor

    from sedac_hf.core.cascade_controller import CascadeController
    from sedac_hf.core.observers import ExitWatch, StepObserver
    from sedac_hf.core.prompt_reader import PromptReader
    from sedac_hf.metrics.call_meter import CallMeter

__all__ = ["ExitSession", "ExitStats", "StepRecord", "active_session", "session_scope"]


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


class ExitStats:
    """Totals over all calls of a model, safe to read and write from several threads.

    Attributes:
        drafts: What became of drafts in exact mode.
        runs_on: What ran the layers in the last call of exact, plain or settled certified mode:
            `"native"` (the Rust core), `"modules"` (the base's own), `"none"`, empty before.
        runs_on_reason: Why it was not the native pass; empty when it was.
        governor: What the last call in certified mode found exits to be worth; empty before.
    """

    def __init__(self, num_layers: int, checkpoints: list[int]) -> None:
        """Start from nothing.

        Args:
            num_layers: Decoder layers of the base.
            checkpoints: Layer index of each checkpoint.
        """
        self.depth = num_layers
        self._checkpoints = list(checkpoints)
        self._lock = threading.Lock()
        self.drafts = DraftStats()
        self.runs_on = self.runs_on_reason = ""
        self.governor: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.drafts.reset()
        with self._lock:
            self._tokens = 0
            self._layers_run = 0
            self._tails = 0
            self._exits = dict.fromkeys(self._checkpoints, 0)
            self._soft = dict.fromkeys(self._checkpoints, 0)
            self._narrowed = 0.0
            self._tries = dict.fromkeys(self._checkpoints, 0)

    def add(self, layers: npt.NDArray[np.int64], tries: npt.NDArray[np.bool_]) -> None:
        """Count tokens.

        Args:
            layers: Layer each token left after, `[tokens]`; `depth` where it went through.
            tries: Whether each checkpoint's head was tried, `[tokens, checkpoints]`.
        """
        left = layers.tolist()
        tried = tries.sum(axis=0).tolist()
        with self._lock:
            self._tokens += len(left)
            for layer in left:
                if layer < self.depth:
                    self._exits[layer] += 1
                self._layers_run += min(layer + 1, self.depth)
            for layer, count in zip(self._checkpoints, tried, strict=True):
                self._tries[layer] += count

    def add_record(self, record: StepRecord, rows: Any = slice(None)) -> None:
        """Count the tokens of a step.

        Args:
            record: What was decided.
            rows: Which rows count.
        """
        self.add(record.layers[rows], record.tries[rows])
        if record.soft_exits is not None and record.kept is not None:
            self.add_soft(record.soft_exits[rows], record.kept[rows])

    def add_soft(self, soft_exits: npt.NDArray[np.int64], kept: npt.NDArray[np.float32]) -> None:
        """Count what soft exits saved of tokens that were added.

        Args:
            soft_exits: Index of each token's checkpoint, `[tokens]`; -1 for none.
            kept: Share of all MLPs' channels that each ran, `[tokens]`.
        """
        counts = np.bincount(soft_exits[soft_exits >= 0], minlength=len(self._checkpoints))
        with self._lock:
            for layer, count in zip(self._checkpoints, counts.tolist(), strict=True):
                self._soft[layer] += count
            self._narrowed += float((1.0 - kept.astype(np.float64)).sum())

    def add_tails(self, tails: int) -> None:
        """Count tails of rows that were run for settled exits, each for one token or several."""
        with self._lock:
            self._tails += tails

    @property
    def tails(self) -> int:
        """Tails that were run for settled exits, summed over rows."""
        return self._tails

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return self._tokens

    @property
    def exits_by_layer(self) -> dict[int, int]:
        """Tokens that left after each checkpoint."""
        with self._lock:
            return dict(self._exits)

    @property
    def tries_by_layer(self) -> dict[int, int]:
        """Tokens for which the exit head was tried at each checkpoint."""
        with self._lock:
            return dict(self._tries)

    @property
    def exit_share(self) -> float:
        """Share of tokens that left early, 0 when there are none."""
        with self._lock:
            return sum(self._exits.values()) / self._tokens if self._tokens else 0.0

    @property
    def soft_exits_by_layer(self) -> dict[int, int]:
        """Tokens whose later layers ran on fewer channels, by checkpoint."""
        with self._lock:
            return dict(self._soft)

    @property
    def soft_exit_share(self) -> float:
        """Share of tokens whose later layers ran on fewer channels, 0 when there are none."""
        with self._lock:
            return sum(self._soft.values()) / self._tokens if self._tokens else 0.0

    @property
    def mean_kept_share(self) -> float:
        """Share of the MLPs' channels that a token ran in the layers it went through, on average.

        1 without soft exits: what hard exits save is in `mean_depth`.
        """
        with self._lock:
            return 1.0 - self._narrowed / self._tokens if self._tokens else 1.0

    @property
    def mean_depth(self) -> float:
        """Layers run per token on average; the full depth when there are no tokens."""
        with self._lock:
            return self._layers_run / self._tokens if self._tokens else float(self.depth)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values; those of drafts where exact mode was used."""
        figures: dict[str, Any] = {
            "tokens": self.tokens,
            "depth": self.depth,
            "mean_depth": self.mean_depth,
            "exit_share": self.exit_share,
            "exits_by_layer": self.exits_by_layer,
            "tries_by_layer": self.tries_by_layer,
            "soft_exit_share": self.soft_exit_share,
            "soft_exits_by_layer": self.soft_exits_by_layer,
            "mean_kept_share": self.mean_kept_share,
            "tails": self.tails,
            "runs_on": self.runs_on,
            "runs_on_reason": self.runs_on_reason,
        }
        if self.governor:
            figures["governor"] = dict(self.governor)
        if self.drafts.passes or self.drafts.reason:
            figures["drafts"] = self.drafts.to_dict()
        return figures

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out: it cannot be copied."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        """One line for people."""
        exits = ", ".join(f"{layer}: {count}" for layer, count in self.exits_by_layer.items())
        text = (
            f"{self.tokens} tokens, {self.exit_share:.1%} left early, mean depth "
            f"{self.mean_depth:.1f} of {self.depth} layers, exits by layer {{{exits}}}"
        )
        if any(self.soft_exits_by_layer.values()):
            text += (
                f", {self.soft_exit_share:.1%} on fewer channels, {self.mean_kept_share:.1%} of "
                "the MLPs' channels run"
            )
        if self.drafts.passes:
            text += f", {self.drafts.tokens_per_pass:.2f} tokens per verification"
        return text

    __repr__ = __str__


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
