"""The texts of a batch whose rows grow at their own pace, and what is told of them meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

__all__ = ["RowTexts", "criteria_by_row"]

IntArray = npt.NDArray[np.int64]

# Criteria of transformers that look at each row by itself.
_BY_ROW = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


def criteria_by_row(criteria: StoppingCriteriaList) -> bool:
    """Whether rows may be asked about one by one, at different lengths.

    Without an end token transformers lets rows go on until all have stopped, so only criteria that
    stop all rows alike are then taken.

    Args:
        criteria: The stopping criteria of the call.
    """
    kinds = [type(each) for each in criteria]
    if not all(kind in _BY_ROW for kind in kinds):
        return False
    return EosTokenCriteria in kinds or StopStringCriteria not in kinds


class RowTexts:
    """Tokens of each row, when it stops, and the streamer that follows.

    Attributes:
        done: Rows that have stopped, `[rows]`.
        new: Tokens that each row has been given, prompt not counted, `[rows]`.
        origins: Where each new token of the first row came from.
    """

    def __init__(
        self,
        input_ids: Tensor,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        first: IntArray,
        origins: list[str] | None = None,
    ) -> None:
        """Begin with the prompt.

        Args:
            input_ids: The prompt `[rows, prompt]`, possibly empty.
            criteria: When a row stops.
            config: Settings of the call; says what is to be returned.
            streamer: Gets each token, or None.
            first: Padding at the beginning of each row, `[rows]`.
            origins: Where to note where tokens come from.
        """
        self.origins = [] if origins is None else origins
        self._prompt = input_ids
        self._criteria = criteria
        self._streamer = streamer
        rows, self._length = input_ids.shape
        self._first = np.minimum(first, self._length)
        prompt = input_ids.cpu().numpy()
        self._tokens = np.concatenate([prompt, np.zeros((rows, 64), np.int64)], axis=1)
        self.done = np.zeros(rows, np.bool_)
        self.new = np.zeros(rows, np.int64)
        limits = [int(each.max_length) for each in criteria if type(each) is MaxLengthCriteria]
        self._most = min(limits, default=1 << 40) - self._length
        ends = [each.eos_token_id for each in criteria if type(each) is EosTokenCriteria]
        self._ends = frozenset(token for each in ends for token in each.flatten().tolist())
        self._has_end = any(hasattr(each, "eos_token_id") for each in criteria)
        self._others = [
            each for each in criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)
        ]
        pad = getattr(config, "_pad_token_tensor", None)
        self._pad = 0 if pad is None else int(pad)
        wanted = bool(config.return_dict_in_generate)
        self._scores: list[list[Tensor]] | None = None
        self._logits: list[list[Tensor]] | None = None
        if wanted and config.output_scores:
            self._scores = [[] for _ in range(rows)]
        if wanted and config.output_logits:
            self._logits = [[] for _ in range(rows)]
        self._streamed = 0

    @property
    def wants_logits(self) -> bool:
        """Whether scores or logits of each token are to be kept."""
        return self._scores is not None or self._logits is not None

    @property
    def ends_by_tokens(self) -> bool:
        """Whether nothing but `ends` and `remaining` stops a row."""
        return not self._others

    @property
    def is_streamed(self) -> bool:
        """Whether a streamer waits for each token."""
        return self._streamer is not None

    @property
    def calls_out(self) -> bool:
        """Whether code of the caller's runs between steps: a streamer of its own."""
        if self._streamer is None:
            return False
        return type(self._streamer).__module__.split(".")[0] not in ("transformers", "sedac_hf")

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a row."""
        return self._ends

    def remaining(self, row: int) -> int:
        """Tokens that a row may still be given."""
        return 0 if self.done[row] else int(self._most - self.new[row])

    def text(self, row: int) -> IntArray:
        """A row's tokens without padding, `[length]`."""
        return self._tokens[row, self._first[row] : self._length + self.new[row]]

    def length(self, row: int) -> int:
        """Tokens of a row as logits processors count them, padding included."""
        return self._length + int(self.new[row])

    def prefix(self, row: int) -> Tensor:
        """A row's tokens as logits processors see them, `[prompt + new]`."""
        return torch.from_numpy(self._tokens[row, : self._length + self.new[row]].copy())

    def append(
        self,
        row: int,
        token: int,
        scores: Tensor | None = None,
        logits: Tensor | None = None,
        origin: str = "base",
    ) -> bool:
        """Give a row its next token.

        Args:
            row: The row.
            token: The token.
            scores: What the token was chosen by, `[vocabulary]`, where it is to be kept.
            logits: The base's logits, likewise.
            origin: Who had drafted it, or the base.

        Returns:
            Whether the row has stopped.
        """
        at = self._length + int(self.new[row])
        if at == self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)
        self._tokens[row, at] = token
        self.new[row] += 1
        if row == 0:
            self.origins.append(origin)
        if self._scores is not None and scores is not None:
            self._scores[row].append(scores)
        if self._logits is not None and logits is not None:
            self._logits[row].append(logits)
        stop = token in self._ends or self.new[row] >= self._most
        if self._others:
            kept = None if self._scores is None else tuple(s[None] for s in self._scores[row])
            prefix = self.prefix(row)[None].to(self._prompt.device)
            answers = [each(prefix, kept) for each in self._others]
            stop = stop or any(bool(torch.as_tensor(answer).any()) for answer in answers)
        self.done[row] = stop
        self._stream()
        return bool(stop)

    def sequences(self) -> Tensor:
        """Prompts and new tokens, padded to the longest row, `[rows, length]`."""
        new = self._columns(0, int(self.new.max()))
        return torch.cat([self._prompt, new.to(self._prompt.device)], dim=1)

    def scores(self) -> tuple[Tensor, ...] | None:
        """Scores of each step, `[rows, vocabulary]` each; zeros where a row had stopped."""
        return None if self._scores is None else _by_step(self._scores)

    def logits(self) -> tuple[Tensor, ...] | None:
        """Logits of each step, likewise."""
        return None if self._logits is None else _by_step(self._logits)

    def end(self) -> None:
        """Tell the streamer that all is done."""
        if self._streamer is not None:
            cast(Any, self._streamer).end()

    def _columns(self, start: int, stop: int) -> Tensor:
        """New tokens `start` to `stop - 1` of all rows, padded behind a row's end."""
        columns = self._tokens[:, self._length + start : self._length + stop].copy()
        columns[np.arange(start, stop) >= self.new[:, None]] = self._pad
        return torch.from_numpy(columns)

    def _stream(self) -> None:
        """Hand on the steps that every row has taken or will never take."""
        if self._streamer is None:
            return
        going = self.new[~self.done]
        known = int(going.min() if len(going) else self.new.max())
        while self._streamed < known:
            column = self._columns(self._streamed, self._streamed + 1)[:, 0]
            cast(Any, self._streamer).put(column)
            self._streamed += 1


def _by_step(kept: list[list[Tensor]]) -> tuple[Tensor, ...]:
    steps = max(len(row) for row in kept)
    empty = torch.zeros_like(next(row[0] for row in kept if row))
    return tuple(
        torch.stack([row[step] if step < len(row) else empty for row in kept])
        for step in range(steps)
    )
