"""The parts that decide on and carry out early exits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sedac_hf.lazy_names import lazy_names

if TYPE_CHECKING:
    from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
    from sedac_hf.core.cascade_controller import CascadeController
    from sedac_hf.core.exit_strategy import AdaptiveSoftExit, HardExit, SoftExit

__all__ = [
    "AdaptiveSoftExit",
    "CascadeConfig",
    "CascadeController",
    "HardExit",
    "LayerConfig",
    "SoftExit",
]

_HOMES = {
    "AdaptiveSoftExit": "exit_strategy",
    "CascadeConfig": "cascade_config",
    "CascadeController": "cascade_controller",
    "HardExit": "exit_strategy",
    "LayerConfig": "cascade_config",
    "SoftExit": "exit_strategy",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
