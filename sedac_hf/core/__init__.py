"""The parts that decide on and carry out early exits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
    from sedac_hf.core.cascade_controller import CascadeController

__all__ = ["CascadeConfig", "CascadeController", "LayerConfig"]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that light submodules stay light.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sedac_hf.core.cascade_controller"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
