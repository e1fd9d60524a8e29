"""The logits processor commits records and scales the logits of exits, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from sedac_hf.core.cascade_controller import CascadeConfig, CascadeController
from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.core.session import ExitSession, StepRecord, session_scope
from sedac_hf.generation.finish import finish_generation
from sedac_hf.generation.logits_processor import SedacLogitsProcessor, scale_exits
from tests.wrapping import rule, wrap


def record(layers: list[int], checkpoints: list[int]) -> StepRecord:
    found = StepRecord.full_depth(len(layers), 8, 2)
    found.layers[:] = layers
    found.checkpoints[:] = checkpoints
    found.tries[:, 0] = np.array(checkpoints) >= 0
    return found


def session_with(temperatures: tuple[float, float]) -> ExitSession:
    rules = [rule(k, temperature=t) for k, t in zip((1, 4), temperatures, strict=True)]
    controller = CascadeController(CascadeConfig(rules))
    return ExitSession(owner=None, mode="certified", cascade=controller)


def test_rows_are_scaled_by_the_temperature_of_their_exit() -> None:
    session = session_with((2.0, 0.5))
    session.pending = record([1, 4, 8], [0, 1, -1])
    processor = SedacLogitsProcessor(session, 8, 2)
    scores = torch.randn(3, 12)
    found = processor(torch.zeros(3, 5, dtype=torch.long), scores)
    for row, temperature in enumerate((2.0, 0.5, 1.0)):
        expected = (scores[row] / temperature).softmax(-1)
        torch.testing.assert_close(found[row].softmax(-1), expected)
    assert torch.equal(found[2], scores[2])
    assert session.prompt_length == 5
    assert [r.layers.tolist() for r in session.records] == [[1, 4, 8]]


def test_log_probabilities_stay_log_probabilities() -> None:
    scores = torch.randn(2, 12).log_softmax(-1)
    found = scale_exits(scores, np.array([0, -1]), [3.0])
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))
    torch.testing.assert_close(found[0], (scores[0] / 3).log_softmax(-1))


def test_whole_sequences_are_scaled_position_by_position() -> None:
    scores = torch.randn(2, 3, 12)
    checkpoints = np.array([[0, -1, 1], [-1, -1, 0]])
    found = scale_exits(scores, checkpoints, [2.0, 4.0])
    for row, position in np.ndindex(2, 3):
        factor = [2.0, 4.0, 1.0][checkpoints[row, position]]
        expected = (scores[row, position] / factor).softmax(-1)
        torch.testing.assert_close(found[row, position].softmax(-1), expected)


def test_nothing_to_scale_leaves_the_very_tensor() -> None:
    scores = torch.randn(2, 12)
    assert scale_exits(scores, np.array([0, 1]), [1.0, 1.0]) is scores
    assert scale_exits(scores, np.array([-1, -1]), [2.0, 2.0]) is scores


def test_the_wrapper_puts_it_before_all_others(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    config = GenerationConfig(repetition_penalty=1.5)
    arguments: dict[str, Any] = {"input_ids_seq_length": 3, "device": "cpu"}
    assert not any(
        isinstance(p, SedacLogitsProcessor)
        for p in model._get_logits_processor(config, **arguments)
    )
    with session_scope(ExitSession(owner=model, mode="plain")):
        found = model._get_logits_processor(config, **arguments)
    assert isinstance(found[0], SedacLogitsProcessor)
    assert len(found) == 2
    assert found[0].supports_continuous_batching


def finished(session: ExitSession, result: Any) -> ExitStats:
    stats = ExitStats(8, [1, 4])
    session.prompt_length = 2
    finish_generation(result, session, stats)
    return stats


def test_steps_that_were_undone_are_not_counted() -> None:
    session = session_with((1.0, 1.0))
    session.records = [record([8, 8], [-1, -1]), record([1, 8], [0, -1]), record([1, 1], [0, 0])]
    result = GenerateDecoderOnlyOutput(sequences=torch.ones(2, 4, dtype=torch.long))
    stats = finished(session, result)
    assert result.exit_layers.tolist() == [[8, 1], [8, 8]]
    assert stats.tokens == 4
    assert stats.exits_by_layer == {1: 1, 4: 0}


def test_tokens_after_the_end_are_not_counted() -> None:
    session = session_with((1.0, 1.0))
    session.eos_tokens = torch.tensor([5, 6])
    session.records = [record([1, 1], [0, 0])] * 3
    sequences = torch.tensor([[9, 9, 7, 6, 0], [9, 9, 5, 0, 0]])
    assert finished(session, sequences).tokens == 3


def test_layers_of_beams_follow_the_rows_they_came_from() -> None:
    session = session_with((1.0, 1.0))
    session.records = [record([8, 8, 8], [-1] * 3), record([1, 4, 8], [0, 1, -1])]
    result = GenerateBeamDecoderOnlyOutput(
        sequences=torch.ones(2, 4, dtype=torch.long),
        beam_indices=torch.tensor([[0, 1], [2, -1]]),
    )
    stats = finished(session, result)
    assert result.exit_layers.tolist() == [[8, 4], [8, 8]]
    assert stats.tokens == 6, "every beam's work counts"


@pytest.mark.parametrize("records", [0, 2])
def test_nothing_is_added_without_records_or_a_prompt(records: int) -> None:
    session = session_with((1.0, 1.0))
    session.records = [record([1], [0])] * records
    stats = ExitStats(8, [1, 4])
    finish_generation(torch.ones(1, 4, dtype=torch.long), session, stats)
    assert stats.tokens == 0
