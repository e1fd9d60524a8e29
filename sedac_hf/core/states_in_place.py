"""States on the CPU as the Rust core reads them, without a copy where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf import _core
from sedac_hf.errors import ConfigError

__all__ = ["in_place", "native_risk"]

_DTYPES: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def native_risk(probe: _core.Probe) -> Callable[[Tensor], Tensor]:
    """A packed probe as a function of states on the CPU.

    Args:
        probe: The probe.
    """

    def risk(states: Tensor) -> Tensor:
        return torch.from_numpy(probe.risk(*in_place(states)))

    return risk


def in_place(hidden: Tensor) -> tuple[npt.NDArray[Any], str]:
    """A tensor's memory as an array that the core reads, and what it holds.

    Args:
        hidden: States `[rows, width]`; types that the core does not know are converted.

    Returns:
        The array and the name of its type; bfloat16 travels as its bits.

    Raises:
        ConfigError: If the states are not on the CPU.
    """
    if not hidden.is_cpu:
        raise ConfigError(
            f"states must be on the CPU, found {hidden.device}: compute the risks there and use "
            "step_risk."
        )
    if hidden.requires_grad:
        hidden = hidden.detach()
    dtype = _DTYPES.get(hidden.dtype)
    if dtype is None:
        return hidden.float().numpy(), "f32"
    if not hidden.is_contiguous() and hidden.dim() == 2 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    # NumPy has no bfloat16; its bits travel as integers.
    return (hidden.view(torch.uint16) if dtype == "bf16" else hidden).numpy(), dtype
