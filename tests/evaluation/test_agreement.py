from __future__ import annotations

import math

import pytest
import torch

from sedac_hf.evaluation.agreement import base_logits, divergences, rows_equal
from sedac_hf.evaluation.arms import make_batches
from tests.evaluation.wrapped import wrapped_llama

PROMPTS = [[5, 6, 7], [8]]


def scored(*values, dtype=torch.float32):
    """Logits that are the same after every text, and the texts that were asked about."""
    asked = []

    def logits(ids):
        asked.append(ids.tolist())
        return torch.tensor(values, dtype=dtype)

    return logits, asked


def texts(*rows):
    """Texts that continue the padded prompts."""
    (batch,) = make_batches(PROMPTS, 2, pad=0)
    return batch, torch.cat([batch.ids, torch.tensor(rows)], dim=1)


def test_the_gap_is_that_of_the_two_tokens_at_the_first_difference_of_each_row():
    batch, theirs = texts([1, 2, 3], [1, 2, 3])
    _, ours = texts([1, 0, 0], [1, 2, 4])
    logits, asked = scored(1.0, 9.0, 4.5, 2.0, 1.75)
    first, second = divergences(batch, ours, theirs, logits)
    assert (first.position, first.gap) == (1, 3.5)
    assert (second.position, second.gap) == (2, 0.25)
    # The base is asked after the text up to there, without padding.
    assert asked == [[[5, 6, 7, 1]], [[8, 1, 2]]]


def test_equal_rows_ask_nothing():
    batch, theirs = texts([1, 2], [3, 4])
    logits, asked = scored(0.0)
    assert divergences(batch, theirs.clone(), theirs, logits) == []
    assert asked == []
    assert rows_equal(theirs.clone(), theirs) == [True, True]


@pytest.mark.parametrize(
    ("dtype", "pair", "units"),
    [
        # bfloat16 has 8 bits: its numbers between 16 and 32 lie 1/8 apart, between 8 and 16 1/16.
        (torch.bfloat16, (17.0, 16.875), 1.0),
        (torch.bfloat16, (17.0, 16.75), 2.0),
        (torch.bfloat16, (-9.0, -8.0), 16.0),
        (torch.float16, (4.0, 4.0078125), 2.0),
        (torch.float32, (1.0, 1.0 + 2.0**-22), 2.0),
        (torch.bfloat16, (17.0, 17.0), 0.0),
    ],
)
def test_a_gap_is_counted_in_steps_of_the_data_type_at_the_larger_logit(dtype, pair, units):
    batch, theirs = texts([0], [0])
    _, ours = texts([1], [0])
    (found,) = divergences(batch, ours, theirs, scored(*pair, dtype=dtype)[0])
    assert found.units == pytest.approx(units)


def test_a_gap_of_logits_that_are_not_finite_is_no_number():
    batch, theirs = texts([0], [0])
    _, ours = texts([1], [0])
    (found,) = divergences(batch, ours, theirs, scored(math.nan, 1.0)[0])
    assert math.isnan(found.gap)
    assert math.isnan(found.units)


def test_texts_of_other_lengths_or_tokens_are_not_equal():
    _, theirs = texts([1, 2], [3, 4])
    _, ours = texts([1, 2], [3, 5])
    assert rows_equal(ours, theirs) == [True, False]
    assert rows_equal(ours[:, :-1], theirs) == [False, False]


def test_a_made_up_pair_of_models_parts_by_the_gap_of_the_bases_own_logits():
    """Where greedy tokens of two models first differ, the base's logits there give the gap."""
    base, other = wrapped_llama(share=0.0), wrapped_llama(share=0.0)
    with torch.no_grad():
        other.base_lm.lm_head.weight += 0.3 * torch.randn_like(other.base_lm.lm_head.weight)
    (batch,) = make_batches([[5, 6, 7, 9]], 1, pad=0)
    ours, theirs = (
        model.base_lm.generate(batch.ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        for model in (other, base)
    )
    (found,) = divergences(batch, ours, theirs, base_logits(base))
    at = 4 + found.position
    assert torch.equal(ours[0, :at], theirs[0, :at])
    scores = base.base_lm(input_ids=theirs[:, :at]).logits[0, -1].detach()
    expected = float(scores[theirs[0, at]] - scores[ours[0, at]])
    assert found.gap == pytest.approx(expected, rel=1e-4)
    assert found.gap > 0
