"""The bench of passes: what it times and whom it refuses."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.errors import NotNativeError
from sedac_hf.evaluation.pass_bench import time_passes
from tests.tiny_models import build_tiny


def test_every_context_and_number_of_tokens_is_timed_once_within_the_models_length() -> None:
    base = build_tiny("mistral", dtype=torch.bfloat16)
    timings = time_passes(base, nodes=(1, 3), contexts=(5, 20, 4000), rounds=1)
    assert [(t.context, t.nodes) for t in timings] == [(5, 1), (5, 3), (20, 1), (20, 3)]
    assert all(t.native_ms > 0 and t.torch_ms is not None and t.torch_ms > 0 for t in timings)
    assert all(t.bandwidth_share > 0 for t in timings)
    [alone] = time_passes(base, nodes=(1,), contexts=(5,), rounds=1, with_torch=False)
    assert alone.torch_ms is None


def test_a_base_that_does_not_run_natively_is_refused_with_the_reason() -> None:
    with pytest.raises(NotNativeError, match="rotary"):
        time_passes(build_tiny("gpt2"))
