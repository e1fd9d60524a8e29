"""What a model has generated so far: tokens, exits by layer, drafts, and what ran it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.core.draft_stats import DraftStats

if TYPE_CHECKING:
    from sedac_hf.core.session import StepRecord

__all__ = ["ExitStats"]


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
