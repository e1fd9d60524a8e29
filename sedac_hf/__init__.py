"""Early exit for Hugging Face language models.

Names are loaded when they are first used: importing this package imports neither torch nor
transformers. The Auto classes of transformers know the model as soon as both are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sedac_hf.errors import SedacError
from sedac_hf.lazy_names import lazy_names
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
    "SedacConfig": "config",
    "SedacForCausalLM": "modeling",
    "benchmark": "evaluation.benchmark",
    "calibrate": "calibration.recalibration",
    "evaluate": "evaluation.perplexity",
    "fit": "calibration.fitting",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)


register_when_used()
