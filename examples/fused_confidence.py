"""How sure several kinds of evidence are, together, that a token may leave after a layer.

    python examples/fused_confidence.py

A running model does the same at each checkpoint with weights that `fit` has learned.

>>> import torch
>>> from sedac_hf.core.confidence_fusion import (
...     EnhancedConfidenceAccumulator,
...     EntropyProbeEstimator,
...     PerplexityEstimator,
... )
>>> from sedac_hf.core.probe_inference import LREProbe
>>> probe = LREProbe(2048)
>>> accumulator = EnhancedConfidenceAccumulator(hidden_dim=2048, use_gated_fusion=True)
>>> accumulator.add_estimator(EntropyProbeEstimator(probe, threshold=1.0), weight=0.6)
>>> accumulator.add_estimator(PerplexityEstimator(2048, vocab_size=32000), weight=0.4)
>>> hidden_states = torch.randn(4, 2048)
>>> confidence = accumulator.compute_confidence(hidden_states, layer_idx=14)
>>> confidence.shape
torch.Size([4])
>>> bool(((confidence >= 0) & (confidence <= 1)).all())
True

A state that is not a number gives no confidence:

>>> hidden_states[0, 0] = float("nan")
>>> accumulator.compute_confidence(hidden_states, layer_idx=14)[0].item()
0.0
"""

from __future__ import annotations

import doctest
import sys

if __name__ == "__main__":
    sys.exit(doctest.testmod(verbose=True).failed)
