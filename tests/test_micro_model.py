"""The micro model has learned its language, and depth matters to it as its tests assume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.micro_model import NUM_LAYERS, MicroModel, train


@pytest.fixture(scope="module")
def held_out(micro_model: MicroModel) -> tuple[Tensor, np.ndarray]:
    """Ids ``[48, 64]`` of new documents and the kind of every target ``[48, 63]``."""
    documents = micro_model.language.documents(48, seed=1_000)
    kinds = np.array([document.kinds for document in documents])[:, 1:]
    return torch.tensor([document.ids for document in documents]), kinds


def scores(logits: Tensor, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return hit or miss and entropy in nats for every target."""
    logp = logits[:, :-1].float().log_softmax(-1)
    hit = logp.argmax(-1) == ids[:, 1:]
    return hit.numpy(), -(logp.exp() * logp).sum(-1).numpy()


def test_it_has_learned_what_can_be_known(micro_model, held_out):
    ids, kinds = held_out
    hit, entropy = scores(micro_model.model(input_ids=ids).logits, ids)
    assert hit[kinds == "chain"].mean() > 0.99
    assert hit[kinds == "pair"].mean() > 0.9
    assert hit[kinds == "free"].mean() < 0.2
    assert entropy[kinds == "chain"].mean() < 0.15
    assert entropy[kinds == "free"].mean() > 2.0


def test_easy_words_are_known_early_and_pairs_only_late(micro_model, held_out):
    ids, kinds = held_out
    other = micro_model.language.documents(48, seed=2_000)
    fit_ids = torch.tensor([document.ids for document in other])

    def states(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            seen = micro_model.model(input_ids=inputs, output_hidden_states=True).hidden_states
        first = seen[1]
        return torch.cat([first, torch.ones_like(first[..., :1])], dim=-1), seen[NUM_LAYERS]

    # an affine lens: what the first layer's state tells of the final one
    early, last = states(fit_ids)
    lens = torch.linalg.lstsq(early.flatten(0, 1), last.flatten(0, 1)).solution
    hit, _ = scores(micro_model.model.lm_head(states(ids)[0] @ lens), ids)
    assert hit[kinds == "chain"].mean() > 0.97
    assert hit[kinds == "pair"].mean() < 0.5


def test_generation_follows_the_chains(micro_model):
    prompt = micro_model.tokenizer("k2a", return_tensors="pt")
    ids = micro_model.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert micro_model.tokenizer.decode(ids[0]) == "k2a k2b k2c k2d k2e"


def test_text_survives_the_tokenizer(micro_model):
    document = micro_model.language.documents(1, seed=3)[0]
    ids = micro_model.tokenizer(micro_model.language.text(document))["input_ids"]
    assert ids == document.ids[1:]


def test_training_is_deterministic_and_leaves_the_generator_alone(micro_model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once, twice = (train(micro_model.language, steps=2).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(once[name], twice[name]) for name in once)
