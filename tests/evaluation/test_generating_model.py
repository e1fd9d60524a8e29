"""The perplexity that is measured is that of the model that generates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sedac_hf.calibration.policy_search import Policy, verify
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.evaluation.perplexity import paired_perplexity
from sedac_hf.evaluation.scoring import document_deltas, score_documents
from sedac_hf.evaluation.settled_scoring import score_policies
from tests.evaluation.wrapped import LAYERS, random_documents, wrapped_llama


class Dictation(LogitsProcessor):
    """Makes generation write a given text, and keeps what the model would have said."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.nll: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.ids[input_ids.shape[1]]
        self.nll.append(-float(torch.log_softmax(scores[0].float(), -1)[token]))
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


def dictated(model, document, mode):
    """NLL of the continuation and the layer each decode step left after, by real generation."""
    ids = document.ids.tolist()
    dictation = Dictation(ids)
    out = model.generate(
        torch.tensor([ids[: document.prompt_length]]),
        max_new_tokens=len(ids) - document.prompt_length,
        do_sample=False,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([dictation]),
        return_dict_in_generate=True,
        sedac_mode=mode,
    )
    assert out.sequences[0].tolist() == ids
    # The first new token comes from the prompt's own pass.
    return sum(dictation.nll), out.exit_layers[0, 1:].tolist()


@pytest.mark.parametrize("head", ["lens", "block"])
@pytest.mark.parametrize("gate", [0.0, 0.02])
def test_scores_equal_those_of_real_generation_token_by_token(head, gate):
    model, some = wrapped_llama(head, gate=gate), random_documents(12)
    found = score_documents(model, some, exits="simulate")
    left = np.zeros(model.exit_stats.depth + 1, int)
    for i, document in enumerate(some):
        nll, layers = dictated(model, document, "certified")
        assert found.nll[i] == pytest.approx(nll, abs=2e-4)
        for layer in layers:
            left[min(layer + 1, model.exit_stats.depth)] += 1
    np.testing.assert_array_equal(found.exits.sum(axis=0), left)
    # Both checkpoints and full depth must have been seen for this to show anything.
    assert all(left[layer + 1] for layer in LAYERS)
    assert left[-1]


def test_full_depth_scores_equal_plain_generation():
    model, some = wrapped_llama(), random_documents(4)
    found = score_documents(model, some)
    for i, document in enumerate(some):
        assert found.nll[i] == pytest.approx(dictated(model, document, "plain")[0], abs=2e-4)


def test_stale_keys_and_values_are_part_of_the_loss():
    """Tokens after an exit see other K/V, so even those that stay deep change."""
    model, some = wrapped_llama(), random_documents(12, low=13)
    full, exited = score_documents(model, some), score_documents(model, some, exits="simulate")
    deltas = document_deltas(full, exited)
    policy = Policy(model.cascade, 0.0, 0.0, 0.9)
    np.testing.assert_allclose(deltas, verify(model, some, [policy])[0], atol=1e-6)
    assert np.abs(deltas).max() > 1e-3


def test_a_closed_cascade_changes_nothing_at_all():
    model, some = wrapped_llama(share=0.0), random_documents(6)
    found = paired_perplexity(model, some)
    assert found.exit_share == 0.0
    assert found.ppl_increase == pytest.approx(0.0, abs=1e-6)


def test_without_thresholds_both_are_the_base():
    model, some = wrapped_llama(), random_documents(6)
    model.set_cascade(None)
    found = paired_perplexity(model, some)
    assert (found.ppl_increase, found.exit_share) == (0.0, 0.0)


@pytest.mark.parametrize("head", ["lens", "block"])
@pytest.mark.parametrize("gate", [0.0, 0.02])
def test_scores_of_settled_exits_equal_those_of_real_generation(head, gate):
    model, some = wrapped_llama(head, gate=gate), random_documents(12)
    model.config.kv_mode = "settle"
    full, found = score_policies(model, some, [None, model.cascade], batch_tokens=50)
    alone = score_documents(model, some, exits="simulate")
    np.testing.assert_allclose(found.nll, alone.nll, atol=2e-4)
    np.testing.assert_array_equal(found.exits, alone.exits)
    np.testing.assert_allclose(full.nll, score_documents(model, some).nll, atol=2e-4)
    for i, document in enumerate(some):
        nll, layers = dictated(model, document, "certified")
        assert found.nll[i] == pytest.approx(nll, abs=2e-4)
        ran = [min(layer + 1, model.exit_stats.depth) for layer in layers]
        assert np.bincount(ran, minlength=len(found.exits[i])).tolist() == found.exits[i].tolist()
    assert 0.1 < found.exit_share < 0.9


def test_closing_a_later_checkpoint_changes_nothing_at_an_earlier_one():
    model, some = wrapped_llama("lens"), random_documents(6)
    model.config.kv_mode = "settle"
    closed = replace(model.cascade.layers[1], threshold=0.0, exit_confidence=2.0)
    only = CascadeConfig([model.cascade.layers[0], closed])
    both, alone = score_policies(model, some, [model.cascade, only])
    assert (both.exits[:, 1] == alone.exits[:, 1]).all()
    assert both.exits[:, 3].any()
    assert not alone.exits[:, 3].any()
