"""The native pass: rows of nodes through the base's layers and exit heads in the Rust core.

States travel as float32, so that running the layers in two calls gives the bits of one call. K/V
are kept in the base's own type: half the memory of float32 at long contexts, and what goes out to a
transformers cache and comes back is the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.core.native_cache import PassKv, check_layer
from sedac_hf.core.native_model import NativeModel, threads
from sedac_hf.core.native_outputs import NativeOutputs, flat
from sedac_hf.core.row_pass import BASE, IntArray, Mask, Placement
from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf import _core
    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.narrow_tail import KeptChannels, NarrowTail
    from sedac_hf.core.native_model import NativeParts

__all__ = ["NativePass"]

# Steps between two looks at the weights where no code of the caller's runs in between.
_RARELY = 16


class NativePass(NativeOutputs):
    """One text's (or batch's) pass: the K/V of its rows. See `RowPass`.

    Use it from one thread at a time; passes of one model may run in several.
    """

    def __init__(
        self,
        model: NativeModel,
        draft: nn.Linear | None = None,
        narrow: NarrowTail | None = None,
    ) -> None:
        """Start without rows; `load` or `begin` makes them.

        Args:
            model: The base and its heads.
            draft: Output layer of the draft vocabulary; None for the whole one.
            narrow: The layers with fewer channels, for soft exits; None for none.

        Raises:
            NotNativeError: If the base cannot run natively; the message says why.
        """
        output = None if draft is None else (draft, model.output(draft))
        self._set_up(model, model.parts(thorough=True), True, output, narrow)

    @property
    def holds_trees(self) -> bool:
        """See `RowPass.holds_trees`."""
        return True

    @classmethod
    def of_parts(cls, model: NativeModel, parts: NativeParts) -> NativePass:
        """A pass over one state of the weights, which are not looked at again.

        Args:
            model: The base and its heads.
            parts: What the Rust core was told of them.
        """
        made = cls.__new__(cls)
        made._set_up(model, parts, False, None, None)
        return made

    def _set_up(
        self,
        model: NativeModel,
        parts: NativeParts,
        watching: bool,
        draft: tuple[nn.Linear, _core.OutputHead] | None,
        narrow: NarrowTail | None,
    ) -> None:
        self._model = model
        self._watching = watching
        self._parts = parts
        self._shell = model.shell
        self._heads = model.exit_heads
        self._draft = draft
        self._kv = PassKv(model.shell, [head.cache_layers for head in model.exit_heads])
        self._going: IntArray | None = None  # rows that are still run; None for all
        self._narrow = narrow
        self._every, self._unseen = 1, 0
        self._held: list[torch.UntypedStorage] = []
        self._put_off: Callable[[], None] | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the base."""
        return self._shell.num_layers

    @property
    def nbytes(self) -> int:
        """Bytes that its K/V take."""
        return self._kv.nbytes

    def begin(self, rows: int) -> None:
        """Start with empty rows.

        Args:
            rows: How many.
        """
        parts = self._parts
        self._kv.begin([parts.base, *parts.heads], rows)
        self._going = self._put_off = None

    def rest(self, done: Mask) -> None:
        """See `RowPass.rest`; their states come out as zeros."""
        self._going = np.flatnonzero(~done) if done.any() else None

    def load(self, cache: Any, rows: int | None = None) -> IntArray:
        """See `RowPass.load`.

        Args:
            cache: The cache; it is not changed.
            rows: Rows of an empty cache, to be filled by `store` alone; None if it must hold some.

        Returns:
            Slots of each row that hold something, padding included, `[rows]`.

        Raises:
            NotNativeError: If a layer of the cache keeps its K/V in a way that cannot be read.
        """
        self.look_again(thorough=True)
        for layer in cache.layers:
            check_layer(layer)
        length = int(cache.get_seq_length())
        # An empty dynamic layer has not been given its tensors yet.
        keys = getattr(cache.layers[0], "keys", None) if cache.layers else None
        if rows is not None and length == 0:
            self.begin(rows)
            return self._kv.loaded.copy()
        if length == 0 or keys is None:
            raise NotNativeError("the cache is empty; run the prompt through the base first")
        self.begin(int(keys.shape[0]))
        self._kv.load(cache, length)
        return self._kv.loaded.copy()

    def store(self, cache: Any, length: IntArray, *, heads: bool = True) -> None:
        """See `RowPass.store`."""
        if heads:
            self.catch_up()
        self._kv.store(cache, length, heads=heads)

    def embed(self, tokens: Tensor, positions: IntArray) -> Tensor:
        """See `RowPass.embed`; positions play no part in bases that run natively."""
        del positions
        # Every step begins here; to look at all weights in each of its calls would take long.
        self.look_again()
        with torch.no_grad():
            found: Tensor = self._shell.base.get_input_embeddings()(tokens)
            return found.float()

    def layers(
        self,
        hidden: Tensor,
        at: Placement,
        start: int,
        stop: int,
        kept: KeptChannels | None = None,
        spread: Spread | None = None,
    ) -> Tensor:
        """See `RowPass.layers`; states come out as float32.

        With `kept` the channels of all rows are added up in the order of their importance, so that
        a row's bits do not depend on what others keep; they differ by rounding from those without.
        """
        if start == stop:  # no layer comes before a checkpoint at the embedding
            return hidden.float()
        parts = self._parts
        if kept is None:
            return self._run(
                parts.base, BASE, hidden, None, at, (start, stop), parts, spread=spread
            )
        assert self._narrow is not None  # a session with soft exits has seen to it
        narrow = self._model.narrow_stack(parts, self._narrow)
        counts = self._narrow.counts(kept, start, stop)
        return self._run(
            narrow.stack, BASE, hidden, None, at, (start, stop), parts, counts, spread=spread
        )

    def fill_last(self, hidden: Tensor, at: Placement) -> None:
        """Write the K/V of the base's last layer, and nothing more.

        Args:
            hidden: States before that layer, `[rows, n, width]`.
            at: Where the nodes stand.
        """
        parts = self._parts
        self._run(parts.base, BASE, hidden, None, at, (self.num_layers - 1, None), parts)

    def head(self, k: int, hidden: Tensor, feedback: Tensor | None, at: Placement) -> Tensor:
        """See `RowPass.head`; states come out as float32."""
        parts = self._parts
        stack, head = parts.heads[k], self._heads[k]
        if stack is None:
            with torch.no_grad():
                state: Tensor = head(hidden.to(self._shell.base.dtype))
                return state.float()
        given = feedback if head.spec.feedback else None
        return self._run(stack, k, hidden, given, at, (0, head.cache_layers), parts)

    def fill(self, k: int, hidden: Tensor, feedback: Tensor | None, at: Placement) -> None:
        """See `RowPass.fill`."""
        parts = self._parts
        stack = parts.heads[k]
        if stack is not None:
            given = feedback if self._heads[k].spec.feedback else None
            self._run(stack, k, hidden, given, at, (0, None), parts)

    def keep(self, part: int, length: IntArray, path: IntArray, counts: IntArray) -> None:
        """See `RowPass.keep`."""
        if part == BASE or self._kv.find(part) is not None:
            whole = [np.ascontiguousarray(array, np.int64) for array in (length, path, counts)]
            self.cache(part).keep(*whole)

    def look_rarely(self) -> None:
        """From now on look at the weights in every sixteenth step only.

        For texts between whose steps no code of the caller's runs. Weights can change in other
        threads alone then, and it has no meaning which step is the first to see it. Until then the
        memory that was described is held, so that it is still there to be read.
        """
        self._every, self._unseen = _RARELY, 0
        self._held = self._parts.storages()

    def look_again(self, *, thorough: bool = False, steps: int = 1) -> NativeParts:
        """Notice what has changed of the weights since the last step.

        Args:
            thorough: See `NativeModel.parts`.
            steps: Steps since the last call.

        Returns:
            What the Rust core is told of them by now.

        Raises:
            NotNativeError: If the base cannot run natively any more.
        """
        self._unseen += steps
        if self._watching and (thorough or self._unseen >= self._every):
            self._unseen = 0
            found = self._model.parts(thorough=thorough)
            if found is not self._parts:
                self._parts = found
                self._held = found.storages() if self._held else []
        return self._parts

    def _run(
        self,
        stack: _core.LayerStack,
        part: int,
        hidden: Tensor,
        feedback: Tensor | None,
        at: Placement,
        span: tuple[int, int | None],
        parts: NativeParts,
        counts: IntArray | None = None,
        *,
        spread: Spread | None = None,
    ) -> Tensor:
        shape, rows = hidden.shape, self._going
        if rows is not None:
            some = torch.from_numpy(rows)
            hidden, at = hidden[some], at.of(rows)
            feedback = None if feedback is None else feedback[some]
            if counts is not None:
                by_row = counts.reshape(len(counts), shape[0], -1)[:, rows]
                counts = np.ascontiguousarray(by_row.reshape(len(counts), -1))
        # The core writes over what it is given.
        states = hidden.detach().to(torch.float32, copy=True).reshape(-1, shape[-1]).contiguous()
        evenness = None
        if spread is not None:
            evenness = torch.full(hidden.shape[:-1], torch.nan)
            spread.risk = evenness
        if len(states):
            stack.run(
                self.cache(part),
                states.numpy(),
                None if feedback is None else flat(feedback),
                np.ascontiguousarray(at.first, np.int64),
                np.ascontiguousarray(at.length, np.int64),
                at.tree,
                parts.rotary.rows(at.positions),
                *span,
                threads(),
                rows,
                counts,
                None if evenness is None else evenness.view(-1).numpy(),
            )
        if rows is None:
            return states.view(shape)
        found = torch.zeros(shape)
        found[some] = states.view(hidden.shape)
        if spread is not None and evenness is not None:
            spread.risk = torch.full(shape[:-1], torch.nan)
            spread.risk[some] = evenness
        return found

    def put_off(self, work: Callable[[], None]) -> None:
        """Have heads' K/V written when a head is first asked: few calls ask one.

        Args:
            work: Writes what the heads lack.
        """
        self._put_off = work

    def catch_up(self) -> None:
        """See `RowPass.catch_up`."""
        work, self._put_off = self._put_off, None
        if work is not None:
            work()

    def cache(self, part: int, *, asks: bool = True) -> _core.KvCache:
        """K/V of a part; it must have rows.

        Args:
            part: `BASE` or the index of a head.
            asks: Whether they will be looked at or written; what was put off is done first then.
        """
        if part != BASE and asks:
            self.catch_up()
        cache = self._kv.find(part)
        if cache is None:
            raise NotNativeError("the pass has no rows yet: call load or begin first")
        return cache
