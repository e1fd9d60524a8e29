"""The output layers of a native pass: logits, best words, and the words of drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.core.native_model import threads
from sedac_hf.core.row_pass import FloatArray, IntArray, Mask

if TYPE_CHECKING:
    from sedac_hf import _core
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.native_cache import PassKv
    from sedac_hf.core.native_model import NativeParts

__all__ = ["NativeOutputs", "flat"]

Arrays = TypeVar("Arrays", bound=tuple[Any, ...])


class NativeOutputs:
    """The part of a native pass that reads states after the last layer, or a head's."""

    _shell: BaseShell
    _parts: NativeParts
    _kv: PassKv
    _draft: tuple[nn.Linear, _core.OutputHead] | None
    _going: IntArray | None

    def logits(self, hidden: Tensor) -> Tensor:
        """See `RowPass.logits`; float32."""
        words = self._shell.vocabulary_size

        def give(states: FloatArray) -> tuple[FloatArray]:
            logits = torch.empty((len(states), words), dtype=torch.float32)
            self._parts.output.run(states, logits.numpy(), threads())
            return (logits.numpy(),)

        return torch.from_numpy(self._of_rows(hidden, give)[0])

    def best(self, hidden: Tensor) -> tuple[IntArray, Mask]:
        """See `RowPass.best`."""

        def give(states: FloatArray) -> tuple[IntArray, Mask]:
            words, sound = np.empty(len(states), np.int64), np.empty(len(states), np.bool_)
            self._parts.output.best(states, words, sound, threads())
            return words, sound

        return self._of_rows(hidden, give)

    def draft_top(self, hidden: Tensor, count: int) -> tuple[IntArray, FloatArray]:
        """See `RowPass.draft_top`."""
        output = self.draft_output
        words = self._shell.vocabulary_size if self._draft is None else self._draft[0].out_features

        def give(states: FloatArray) -> tuple[IntArray, FloatArray]:
            found = np.empty((len(states), min(count, words)), np.int64)
            chances = np.empty(found.shape, np.float32)
            output.top(states, found, chances, threads())
            return found, chances

        return self._of_rows(hidden, give)

    def _of_rows(self, hidden: Tensor, give: Callable[[FloatArray], Arrays]) -> Arrays:
        """What an output layer makes of the rows that go on; zeros for the others."""
        going = self._going
        # States of some rows only, as a caller may pick them, are taken as they are.
        if going is None or len(hidden) != len(self._kv.loaded):
            found = give(flat(hidden))
            shaped = (part.reshape(*hidden.shape[:-1], *part.shape[1:]) for part in found)
            return cast(Arrays, tuple(shaped))
        some = hidden[torch.from_numpy(going)]
        whole = []
        for part in give(flat(some)):
            room = np.zeros((*hidden.shape[:-1], *part.shape[1:]), part.dtype)
            room[going] = part.reshape(*some.shape[:-1], *part.shape[1:])
            whole.append(room)
        return cast(Arrays, tuple(whole))

    @property
    def draft_output(self) -> _core.OutputHead:
        """From states to the words of drafts."""
        return self._parts.output if self._draft is None else self._draft[1]


def flat(hidden: Tensor) -> FloatArray:
    """States one below the other, as the core reads them.

    Args:
        hidden: States `[rows, n, width]`.
    """
    states = hidden.detach().float().reshape(-1, hidden.shape[-1])
    return np.ascontiguousarray(states.numpy())
