"""Test a model with exits on texts of your own, and have a verdict on each promise.

Here with a tiny random model, so that it runs anywhere in seconds:

>>> model, texts = tiny_model(), tiny_texts()
>>> suite = ComprehensiveTestSuite(config=TestConfig(ppl_tolerance=0.01, latency_slo_ms=5000))
>>> _ = suite.add_default_tests()
>>> results = suite.run_all(model.base, model, texts)
>>> [(outcome.name, outcome.passed) for outcome in results.outcomes]
[('quality', True), ('robustness', True), ('performance', True), ('distribution_shift', True)]

Exits that give other words than full depth are found out:

>>> _ = model.set_cascade(careless)
>>> quality = suite.run_all(model.base, model, texts).outcomes[0]
>>> quality.passed
False

With an artefact of yours: `python examples/suite_on_your_texts.py my-sedac mails.txt code.txt`, one
text a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sedac_hf import SedacForCausalLM
from sedac_hf.calibration.documents import Document
from sedac_hf.config import CheckpointSpec
from sedac_hf.core import CascadeConfig, LayerConfig
from sedac_hf.testing import ComprehensiveTestSuite, TestConfig

# The threshold that risks must stay below: nobody leaves, and everybody does.
careful = CascadeConfig([LayerConfig(1, 1e-6)])
careless = CascadeConfig([LayerConfig(1, 1e6)])


def tiny_model() -> SedacForCausalLM:
    """A random Llama with an untrained exit after layer 1 that is never sure enough."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    return SedacForCausalLM.from_base(base, [CheckpointSpec(1, head="lens")], careful)


def tiny_texts() -> dict[str, list[Document]]:
    """Texts of two domains, as token ids; plain strings do as well where there is a tokenizer."""
    rng = np.random.default_rng(0)
    draws = {"mail": (3, 50), "code": (40, 96)}
    return {
        name: [Document(rng.integers(low, high, 40), 8) for _ in range(12)]
        for name, (low, high) in draws.items()
    }


def main(artefact: str, *files: str) -> int:
    """Test an artefact on files of texts; 0 when every test passed."""
    model = SedacForCausalLM.from_pretrained(artefact)
    texts = {Path(file).stem: Path(file).read_text("utf-8").splitlines() for file in files}
    suite = ComprehensiveTestSuite(config=TestConfig(latency_slo_ms=100))
    suite.add_default_tests()
    results = suite.run_all(model.base, model, texts or None)
    suite.print_report(results)
    return 0 if results.passed else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
