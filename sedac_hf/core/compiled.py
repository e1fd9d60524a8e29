"""Functions that torch compiles where it can, for states on an accelerator.

On a CPU the Rust core does this work; elsewhere a probe is half a dozen small kernels, whose
launches cost more than their arithmetic. Compiled they are one or two.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

__all__ = ["Compiled", "is_compiled"]

logger = logging.get_logger(__name__)


def is_compiled() -> bool:
    """Whether the environment lets functions be compiled: `SEDAC_COMPILE=off` forbids it."""
    return os.environ.get("SEDAC_COMPILE", "").lower() not in ("off", "0", "false")


class Compiled:
    """A function of tensors, compiled at its first call; the function itself where that fails."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """Compile nothing yet.

        Args:
            function: Takes tensors and numbers, returns a tensor, has no side effects.
        """
        self._function = function
        self._compiled: Callable[..., Tensor] | None = None
        self._lock = threading.Lock()
        self.failed = False

    def __call__(self, *given: Any) -> Tensor:
        """Call the function."""
        if self.failed or not is_compiled():
            return self._function(*given)
        from torch._dynamo.exc import TorchDynamoException  # half a second, and seldom needed

        try:
            return self._get()(*given)
        except TorchDynamoException as error:
            self.failed = True
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning(
                "torch.compile could not compile %s, which runs as it is from now on: %s",
                self._function.__name__,
                first,
            )
            return self._function(*given)

    def _get(self) -> Callable[..., Tensor]:
        with self._lock:
            if self._compiled is None:
                # Rows come and go: one program must serve every number of them.
                self._compiled = torch.compile(self._function, dynamic=True)
            return self._compiled
