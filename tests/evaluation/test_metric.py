from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sedac_hf.calibration.documents import Document
from sedac_hf.errors import CalibrationError, SedacError
from sedac_hf.evaluation.metric import metric_path
from sedac_hf.evaluation.perplexity import paired_perplexity
from tests.evaluation.wrapped import wrapped_llama
from tests.tiny_models import VOCABULARY, build_tiny

evaluate = pytest.importorskip("evaluate")

TEXTS = ["w5 w9 w11 w40 w7 w30", "w8 w12 w60 w61 w62 w90 w3 w4 w9", "w6 w7"]


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0")


@pytest.fixture
def metric(tmp_path, monkeypatch):
    """The metric, loaded with no network and into a cache of its own."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the metric must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(metric_path(), cache_dir=str(tmp_path / "cache"))


def own_nll(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return -logits.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()


def test_perplexity_of_a_plain_base(metric, tokenizer):
    base = build_tiny("llama")
    found = metric.compute(predictions=TEXTS, model=base, tokenizer=tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    nll = [own_nll(base, row) for row in ids]
    tokens = [len(row) - 1 for row in ids]
    assert found["perplexity"] == pytest.approx(np.exp(sum(nll) / sum(tokens)), rel=1e-4)
    each = [np.exp(a / b) for a, b in zip(nll, tokens, strict=True)]
    assert found["perplexities"] == pytest.approx(each, rel=1e-4)
    assert found["mean_perplexity"] == pytest.approx(np.mean(each), rel=1e-4)
    assert found["exit_share"] == 0.0
    assert "base_perplexity" not in found


def test_perplexity_of_a_model_with_exits(metric, tokenizer):
    model = wrapped_llama()
    found = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    some = [Document(np.array(tokenizer(text)["input_ids"])) for text in TEXTS]
    want = paired_perplexity(model, some)
    assert found["perplexity"] == pytest.approx(want.sedac_ppl)
    assert found["base_perplexity"] == pytest.approx(want.base_ppl)
    assert found["ppl_increase"] == pytest.approx(want.ppl_increase)
    assert found["exit_share"] == want.exit_share > 0


def test_a_model_can_be_named_by_its_folder(metric, tokenizer, tmp_path):
    base = build_tiny("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    found = metric.compute(predictions=TEXTS, model=str(tmp_path / "base"))
    want = metric.compute(predictions=TEXTS, model=base, tokenizer=tokenizer)
    assert found["perplexity"] == pytest.approx(want["perplexity"])


def test_texts_that_cannot_be_scored_are_none_and_lengths_are_cut(metric, tokenizer):
    base = build_tiny("llama")
    found = metric.compute(
        predictions=["w5", TEXTS[1]], model=base, tokenizer=tokenizer, max_length=4
    )
    assert found["perplexities"][0] is None
    nll = own_nll(base, tokenizer(TEXTS[1])["input_ids"][:4])
    assert found["perplexity"] == pytest.approx(np.exp(nll / 3), rel=1e-4)


def test_bad_arguments_are_refused(metric, tokenizer):
    base = build_tiny("llama")
    with pytest.raises(SedacError, match="tokenizer"):
        metric.compute(predictions=TEXTS, model=base)
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        metric.compute(predictions=["w5"], model=base, tokenizer=tokenizer)
