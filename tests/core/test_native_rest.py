"""Rows whose texts have ended are spared by the native pass, and nobody else notices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sedac_hf import SedacForCausalLM
from sedac_hf.core.native_pass import NativePass
from tests.native import LENGTH, behind, prompted, started, step_by_step
from tests.tiny_models import build_tiny, prompt

GIVEN = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": False}


def steps(run: NativePass, base, rests: bool) -> list[Tensor]:
    """Three tokens a row, the middle row at rest from the second on."""
    ids = prompt(3, LENGTH + 3)
    length = run.load(prompted(base, ids[:, :LENGTH]))
    found = []
    for i in range(3):
        if rests:
            run.rest(np.array([False, i > 0, False]))
        at = behind(length + i, 1)
        hidden = run.layers(
            run.embed(ids[:, LENGTH + i : LENGTH + i + 1], at.positions), at, 0, run.num_layers
        )
        found.append(torch.cat([hidden, run.logits(hidden)], dim=-1))
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_a_row_at_rest_costs_nothing_and_changes_no_bit_of_the_others(architecture):
    base = build_tiny(architecture)
    expected = steps(started(base), base, rests=False)
    found = steps(started(base), base, rests=True)
    assert torch.equal(found[0], expected[0])
    for own, all_rows in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(own[[0, 2]], all_rows[[0, 2]])
        assert not own[1].any()
        assert all_rows[1].any()


def test_all_rows_may_rest(llama):
    run = started(llama)
    ids = prompt(2, LENGTH + 1)
    length = run.load(prompted(llama, ids[:, :LENGTH]))
    run.rest(np.array([True, True]))
    at = behind(length, 1)
    hidden = run.layers(run.embed(ids[:, LENGTH:], at.positions), at, 0, run.num_layers)
    assert not hidden.any()


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [2], [-1]])
def test_rows_that_are_not_there_are_refused(llama, rows):
    run = started(llama)
    ids = prompt(2, LENGTH + 1)
    length = run.load(prompted(llama, ids[:, :LENGTH]))
    run._going = np.array(rows)
    at = behind(length, 1)
    with pytest.raises((ValueError, IndexError)):
        run.layers(run.embed(ids[:, LENGTH:], at.positions), at, 0, run.num_layers)


@pytest.mark.parametrize("mode", ["plain", "exact"])
def test_texts_that_end_early_leave_the_others_as_they_are(mode, llama, monkeypatch):
    model = SedacForCausalLM.from_base(llama)
    ids = prompt(4, 6)
    whole = llama.generate(ids, eos_token_id=None, **GIVEN)
    # A word that some rows come to, and some do not.
    counts = (whole[:, 6:, None] == torch.arange(whole.max() + 1)).any(1).sum(0)
    stop = int((counts == 2).nonzero()[0])
    expected = llama.generate(ids, eos_token_id=stop, **GIVEN)
    rested = []
    own = NativePass.rest

    def spy(self, done):
        rested.append(int(done.sum()))
        own(self, done)

    monkeypatch.setattr(NativePass, "rest", spy)
    with step_by_step():
        found = model.generate(ids, eos_token_id=stop, sedac_mode=mode, **GIVEN)
    assert model.exit_stats.runs_on == "native"
    assert torch.equal(found, expected)
    assert max(rested) >= 1


def test_a_cache_that_is_handed_back_holds_every_row(llama, monkeypatch):
    model = SedacForCausalLM.from_base(llama)
    monkeypatch.setattr(NativePass, "rest", lambda self, done: pytest.fail("rows were spared"))
    out = model.generate(
        prompt(3, 6), sedac_mode="plain", eos_token_id=None, return_dict_in_generate=True, **GIVEN
    )
    assert out.past_key_values.get_seq_length() == 6 + GIVEN["max_new_tokens"] - 1
