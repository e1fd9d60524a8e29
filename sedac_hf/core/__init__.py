"""The parts that decide on and carry out early exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sedac_hf.lazy_names import lazy_names

if TYPE_CHECKING:
    from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
    from sedac_hf.core.cascade_controller import CascadeController

__all__ = ["CascadeConfig", "CascadeController", "LayerConfig"]

_HOMES = {
    "CascadeConfig": "cascade_config",
    "CascadeController": "cascade_controller",
    "LayerConfig": "cascade_config",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
