"""Makes the Auto classes of transformers know the model, without importing transformers early.

Transformers offers no entry point for third-party models, so the package waits until somebody loads
the module in which `AutoConfig` lives and registers then. The model class follows when the first
configuration is built, which every Auto class does before it looks for the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register_config", "register_model", "register_when_used"]

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_config() -> None:
    """Register `SedacConfig` with `AutoConfig`: its module does so when it is imported."""
    import_module("sedac_hf.config")


def register_model() -> None:
    """Register `SedacForCausalLM` with `AutoModelForCausalLM`; harmless when repeated."""
    config = import_module("sedac_hf.config")
    auto: Any = import_module("transformers.models.auto.modeling_auto")
    if config.SedacConfig not in auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content:
        modeling = import_module("sedac_hf.modeling")
        auto.AutoModelForCausalLM.register(
            config.SedacConfig, modeling.SedacForCausalLM, exist_ok=True
        )


def register_when_used() -> None:
    """Register now if `AutoConfig` is loaded already, otherwise as soon as it is."""
    if getattr(sys.modules.get(_AUTO_CONFIG), "AutoConfig", None) is not None:
        register_config()
    elif not any(isinstance(finder, _AutoConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoConfigFinder())


class _RegisteringLoader(Loader):
    """Loads the module as its own loader would, then registers the configuration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register_config()


class _AutoConfigFinder(MetaPathFinder):
    """Waits for the module of `AutoConfig`, and steps aside once it has been found."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec
