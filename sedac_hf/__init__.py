"""Early exit for Hugging Face language models.

Names are loaded when they are first used: importing this package imports neither torch nor
transformers. The Auto classes of transformers know the model as soon as both are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sedac_hf.errors import SedacError
from sedac_hf.registration import register_when_used

if TYPE_CHECKING:
    from sedac_hf.calibration.fitting import fit
    from sedac_hf.calibration.recalibration import calibrate
    from sedac_hf.config import SedacConfig
    from sedac_hf.evaluation.benchmark import benchmark
    from sedac_hf.evaluation.perplexity import evaluate
    from sedac_hf.modeling import SedacForCausalLM

__version__ = "0.1.0"

__all__ = [
    "SedacConfig",
    "SedacError",
    "SedacForCausalLM",
    "__version__",
    "benchmark",
    "calibrate",
    "evaluate",
    "fit",
]

_HOMES = {
    "SedacConfig": "sedac_hf.config",
    "SedacForCausalLM": "sedac_hf.modeling",
    "benchmark": "sedac_hf.evaluation.benchmark",
    "calibrate": "sedac_hf.calibration.recalibration",
    "evaluate": "sedac_hf.evaluation.perplexity",
    "fit": "sedac_hf.calibration.fitting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register_when_used()
