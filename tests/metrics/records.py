"""Records of steps, made up."""

from __future__ import annotations

from sedac_hf.core.session import StepRecord


def record_of(rows: int, risk: float = 0.25) -> StepRecord:
    """A step of a model of six layers in which every row leaves at its one checkpoint, layer 1."""
    record = StepRecord.full_depth(rows, 6, 1)
    record.layers[:] = 1
    record.checkpoints[:] = 0
    record.risks[:] = risk
    record.confidences[:] = 0.5
    record.tries[:] = True
    return record
