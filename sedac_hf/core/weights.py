"""Whether a module's weights may be read directly, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightWatch", "has_no_hooks", "is_plain_linear", "is_plain_tensor"]

_SAMPLE = 64  # numbers of each tensor that are compared; enough to notice any dense change


def is_plain_tensor(tensor: Tensor | None) -> bool:
    """Whether a weight is an ordinary floating-point tensor that is at hand.

    Args:
        tensor: A parameter, or None.

    Returns:
        False for quantised, sharded, offloaded (meta) or missing tensors.
    """
    if tensor is None or tensor.is_meta or not tensor.is_floating_point():
        return False
    if type(tensor) not in (nn.Parameter, Tensor) or type(tensor.data) is not Tensor:
        return False
    return tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else."""
    patched = "forward" in module.__dict__ or "_hf_hook" in module.__dict__
    acting = any(map(_acts, module._forward_hooks.values()))
    return not (patched or acting or module._forward_pre_hooks)


def _acts(hook: Any) -> bool:
    """Whether a forward hook does anything outside of calls that ask for more outputs.

    After the first call that asks for hidden states or attentions transformers leaves hooks behind
    that are idle in all others; those that ask run on the base itself.
    """
    return bool(getattr(hook, "__module__", None) != "transformers.utils.output_capturing")


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether a product with `module.weight` equals calling the module.

    Args:
        module: A projection, or None.

    Returns:
        False for subclasses (LoRA, quantised), hooked, parametrised or offloaded modules.
    """
    if type(module) is not nn.Linear or not has_no_hooks(module):
        return False
    return is_plain_tensor(module.weight) and (module.bias is None or is_plain_tensor(module.bias))


class WeightWatch:
    """Notices when tensors that something was derived from have changed.

    Identity, storage and version counter are compared, and a sample of the numbers, since changes
    through `.data` do not count versions.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Remember the present state of `tensors`."""
        self._marks = [_mark(tensor) for tensor in tensors]
        self._sample = _sample(tensors)

    @torch.no_grad()
    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` are those remembered, with the same values."""
        if [_mark(tensor) for tensor in tensors] != self._marks:
            return False
        # A NaN differs from itself and so counts as a change, which only costs a rebuild.
        return torch.equal(_sample(tensors), self._sample)


def _mark(tensor: Tensor) -> tuple[int, int, int, torch.dtype, torch.device]:
    # Tensors made in inference mode keep no version.
    version = -1 if tensor.is_inference() else tensor._version
    return (id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device)


@torch.no_grad()
def _sample(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.empty(0)
    parts = [tensor.reshape(-1)[:_SAMPLE] for tensor in tensors]
    first = parts[0]
    return torch.cat([part.to(first.device, first.dtype) for part in parts])
