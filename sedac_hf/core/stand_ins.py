"""What stands in for the base's modules during one run of the shell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sedac_hf.core.cache_names import with_cache_as

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["RECORD", "LayerCall", "LayerStub", "Loop", "PrologueDone", "RunRecord", "shallow_copy"]

# Put on an instance by accelerate or torch.compile; they would lead back to the real module.
_INSTANCE_PATCHES = frozenset({"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"})


@dataclass(slots=True)
class LayerCall:
    """What the base's decoder passes to one layer, hidden state removed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Loop = Callable[[Tensor, list[LayerCall]], Tensor]


class RunRecord:
    """One run through the shell: the loop to run and the calls seen so far."""

    __slots__ = ("calls", "done", "first_only", "loop")

    def __init__(self, loop: Loop, first_only: bool = False) -> None:
        """Begin a run; with `first_only` it ends at the first layer."""
        self.loop = loop
        self.calls: list[LayerCall] = []
        self.done = False
        self.first_only = first_only


class PrologueDone(BaseException):
    """Leaves the base's forward once the prologue is known; never seen outside the shell."""

    def __init__(self, hidden: Tensor, calls: list[LayerCall]) -> None:
        """Carry what the prologue made."""
        super().__init__()
        self.hidden = hidden
        self.calls = calls


RECORD: ContextVar[RunRecord] = ContextVar("sedac_shell_record")


class LayerStub:
    """Stands in for one decoder layer inside the shell."""

    __slots__ = ("_last", "_layer", "_shell")

    def __init__(self, shell: BaseShell, layer: nn.Module, last: bool) -> None:
        """Stand in for `layer`; the last stub runs the loop."""
        self._shell = shell
        self._layer = layer
        self._last = last

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note the call; hand the state on as the layer would."""
        record = RECORD.get()
        if self._shell.cache_kwarg not in kwargs:  # an older name that the layer would translate
            kwargs = with_cache_as(self._shell.cache_kwarg, kwargs)
        record.calls.append(LayerCall(args, kwargs))
        if record.first_only:
            raise PrologueDone(hidden, record.calls)
        if self._last:
            hidden = record.loop(hidden, record.calls)
            record.done = True
        return (hidden,) if self._shell.returns_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        """The layer's own: some decoders ask for its type before calling it."""
        return getattr(self._layer, name)


def _hooked_forward(copy: nn.Module, real: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a copy whose original carries an accelerate hook."""
    hook = cast(Any, real)._hf_hook
    args, kwargs = hook.pre_forward(real, *args, **kwargs)
    with torch.no_grad() if hook.no_grad else nullcontext():
        output = type(copy).forward(copy, *args, **kwargs)
    return hook.post_forward(real, output)


def shallow_copy(module: nn.Module, overrides: dict[str, Any]) -> nn.Module:
    """A copy that shares everything with `module` except the attributes in `overrides`."""
    copy: nn.Module = object.__new__(type(module))
    state = {k: v for k, v in module.__dict__.items() if k not in _INSTANCE_PATCHES}
    modules = state["_modules"]
    state["_modules"] = {k: v for k, v in modules.items() if k not in overrides}
    if "_hf_hook" in module.__dict__:
        state["forward"] = partial(_hooked_forward, copy, module)
    state.update(overrides)
    object.__setattr__(copy, "__dict__", state)
    return copy
