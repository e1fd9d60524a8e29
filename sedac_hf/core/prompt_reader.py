"""Prompts through the native pass, in place of the base's own forward.

A chunk of the prompt is a chain of nodes, so a position gets the bits that it would get alone: a
prompt read at once, in parts, or behind a cache that was handed in has the same states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from sedac_hf.core.cache_names import CACHE_NAMES, cache_in, cache_name
from sedac_hf.core.decoder_loop import heads_follow
from sedac_hf.core.row_pass import Placement

if TYPE_CHECKING:
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.native_pass import NativePass
    from sedac_hf.core.row_pass import IntArray
    from sedac_hf.core.session import ExitSession

__all__ = ["PromptReader"]

# Positions of a chunk, all rows together: from here on a product is bound by arithmetic alone, and
# larger chunks cost as much or more for each position.
_CHUNK = 64
_LEAST = 16  # positions of each row, however many rows there are

# Numbers that are kept for heads until one is asked, at most; 64 MiB.
_MOST_WAITING = 1 << 24

# What a base's forward may be given without doing more than the pass does.
_KNOWN = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "use_cache",
    "logits_to_keep",
    "return_dict",
}


class _Chunk(NamedTuple):
    """What heads lack of some positions.

    Attributes:
        inputs: Each head, and the states at its checkpoint, `[rows, n, width]`.
        states: States after the last layer, or before it where heads wait for them; same shape.
        before: Final-layer state of the position before, `[rows, 1, width]`.
        at: Where the positions stand.
    """

    inputs: list[tuple[int, Tensor]]
    states: Tensor
    before: Tensor
    at: Placement

    @property
    def size(self) -> int:
        """Numbers that are kept."""
        return self.states.numel() * (1 + len(self.inputs))


class PromptReader:
    """Answers the forwards of one call's prompt.

    Attributes:
        has_read: Whether it was asked; the base has read the prompt otherwise.
        length: Slots that every row holds.
        last: Final-layer state of the last position, `[rows, 1, width]`, float32.
        states: Final-layer states of all positions read, if they are to be kept.
    """

    def __init__(
        self,
        run: NativePass,
        parts: ExitParts,
        session: ExitSession,
        cache: Any,
        rows: int,
        first: IntArray | None,
        *,
        only: int | None = None,
        keeps_states: bool,
    ) -> None:
        """Take over what the cache holds.

        Args:
            run: The pass that will decode.
            parts: What exits are made of.
            session: The call.
            cache: The call's cache, empty or not; `NativePass.store` alone will fill it.
            rows: Rows of the call.
            first: First slot of each row that is no padding, `[rows]`; None without padding.
            only: The head that will be asked; None if all must follow.
            keeps_states: Whether `states` is wanted.

        Raises:
            NotNativeError: If the cache keeps its K/V in a way that cannot be read.
        """
        self.has_read = False
        self.states: list[Tensor] = []
        self._run = run
        self._parts = parts
        asks = session.cascade is not None and not session.is_soft
        wanted = asks or session.drafts
        follows = wanted and heads_follow(parts.layout, session, cache)
        self._heads = [
            (k, head)
            for k, head in enumerate(parts.heads if follows else ())
            if only is None or k == only
        ]
        self.length = int(run.load(cache, rows).max(initial=0))
        self._cache = cache
        self._first = np.zeros(rows, np.int64) if first is None else first
        self._feeds = any(head.spec.feedback for _, head in self._heads)
        self._keeps_states = keeps_states and self._feeds
        self._waiting: list[_Chunk] = []
        width = int(parts.shell.base.config.hidden_size)
        self.last = torch.zeros((rows, 1, width))
        if self._feeds:
            self.last = parts.layout.last_state(cache, self.last).float()

    @property
    def lengths(self) -> IntArray:
        """Slots that each row holds, `[rows]`."""
        return np.full(len(self._first), self.length, np.int64)

    def serves(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward asks for nothing but the prompt.

        Args:
            arguments: What the base's forward would be given.
        """
        tokens = arguments.get("input_ids", arguments.get("inputs_embeds"))
        return (
            arguments.keys() <= _KNOWN
            and cache_in(arguments) is self._cache
            and tokens is not None
            and len(tokens) == len(self._first)
            and tokens.shape[1] > 0
        )

    @torch.no_grad()
    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Read the next positions.

        Args:
            arguments: What the base's forward would be given; see `serves`.

        Returns:
            Logits of the last position, `[rows, 1, vocabulary]`, and the cache as it was.
        """
        embedded = "input_ids" not in arguments
        tokens: Tensor = arguments["inputs_embeds" if embedded else "input_ids"]
        rows, count = len(self._first), tokens.shape[1]
        following = torch.arange(self.length, self.length + count)[None]
        positions = arguments.get("position_ids", following)
        positions = np.asarray(positions.expand(rows, count).cpu(), np.int64)
        chunk = max(_CHUNK // rows, _LEAST)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            at = self._place(positions[:, part])
            given = tokens[:, part]
            self._read(given if embedded else self._run.embed(given, at.positions), at)
        self.has_read = True
        output: Any = CausalLMOutputWithPast
        return output(logits=self._run.logits(self.last), **{cache_name(output): self._cache})

    def _place(self, positions: IntArray) -> Placement:
        """Chains; padding sees itself alone, and is seen by nobody."""
        nodes = positions.shape[1]
        length = self.lengths
        real = self.length + np.arange(nodes) >= self._first[:, None]
        seen = np.tri(nodes, dtype=np.bool_) & real[:, :, None] & real[:, None, :]
        tree = seen | np.eye(nodes, dtype=np.bool_)
        return Placement(np.minimum(self._first, length), length, positions, tree)

    def _read(self, hidden: Tensor, at: Placement) -> None:
        run, depth, layer = self._run, self._parts.shell.num_layers, 0
        inputs = []
        for k, head in self._heads:
            hidden = run.layers(hidden, at, layer, head.layer_idx + 1)
            layer = head.layer_idx + 1
            inputs.append((k, hidden))
        if self._keeps_states or layer == depth:
            final = run.layers(hidden, at, layer, depth)
            self._fill(_Chunk(inputs, final, self.last, at))
            if self._keeps_states:
                self.states.append(final)
        else:
            hidden = run.layers(hidden, at, layer, depth - 1)
            run.fill_last(hidden, at)
            end = Placement(at.first, at.length, at.positions[:, -1:], at.tree[:, -1:])
            final = run.layers(hidden[:, -1:], end, depth - 1, depth)
            self._wait(_Chunk(inputs, hidden, self.last, at))
        self.last = final[:, -1:].clone()
        self.length += at.nodes

    def _wait(self, chunk: _Chunk) -> None:
        """Fill heads later, if at all: most states of the last layer serve nothing else."""
        if not chunk.inputs:
            return
        self._waiting.append(chunk)
        if sum(each.size for each in self._waiting) > _MOST_WAITING:
            self._fill_waiting()
        else:
            self._run.put_off(self._fill_waiting)

    @torch.no_grad()
    def _fill_waiting(self) -> None:
        chunks, self._waiting = self._waiting, []
        depth = self._parts.shell.num_layers
        for chunk in chunks:
            if self._feeds:
                final = self._run.layers(chunk.states, chunk.at, depth - 1, depth)
                chunk = chunk._replace(states=final)
            self._fill(chunk)

    def _fill(self, chunk: _Chunk) -> None:
        """Write heads' K/V, given final-layer states."""
        feedback = None
        if self._feeds:
            # A text's first token has no predecessor.
            follows = torch.from_numpy(chunk.at.slots > self._first[:, None]).unsqueeze(-1)
            feedback = torch.cat([chunk.before, chunk.states[:, :-1]], dim=1) * follows
        for k, states in chunk.inputs:
            self._run.fill(k, states, feedback, chunk.at)
