"""Finding out what a base model does between its last layer and its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["watch_epilogue"]


class _Spy:
    """Stands in for a child of the decoder and notes its calls."""

    def __init__(self, name: str, module: Any, log: list[tuple[str, Any, Any]]) -> None:
        self._name = name
        self._module = module
        self._log = log

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._module(*args, **kwargs)
        only = args[0] if len(args) == 1 and not kwargs else None
        self._log.append((self._name, only, output))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@torch.no_grad()
def watch_epilogue(shell: BaseShell) -> tuple[tuple[str, ...], type[Any]]:
    """Run the base once without layers and note what is applied after them.

    Args:
        shell: The shell of the base.

    Returns:
        Names of the decoder's children that are applied one after the other to the last state,
        empty when that is not all that happens, and the type of the decoder's output.
    """
    log: list[tuple[str, Any, Any]] = []
    spies = {
        name: _Spy(name, child, log)
        for name, child in shell.decoder.named_children()
        if not isinstance(child, nn.ModuleList)
    }
    after: list[Tensor] = []

    def loop(hidden: Tensor, calls: list[Any]) -> Tensor:
        del calls
        log.clear()
        after.append(hidden + 0)  # a tensor of its own: what follows is told by identity
        return after[0]

    ids = torch.ones((1, 2), dtype=torch.long, device=shell.input_device)
    output = shell.run_decoder(loop, spies, input_ids=ids, use_cache=False)
    state = after[0]
    names: list[str] = []
    for name, given, result in log:
        if given is not state:
            return (), type(output)
        names.append(name)
        state = result
    return tuple(names), type(output)
