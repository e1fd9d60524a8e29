"""A Llama of six layers, trained in half a minute, on which early exits really work.

Random weights say nothing of exits: every layer is as wrong as the next. This model has learned a
small synthetic language whose words differ in the depth they need:

* *chain* words follow from the word before (``k3a k3b k3c``): the first layer knows them;
* *pair* words are looked up by the two names before (``n4 n1 v7``): the layers find them step by
  step, and only the last one surely;
* *free* words are drawn at random: no depth knows them, their entropy stays high.

The fixture ``micro_model`` trains once in a test session, shared by all xdist workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Kind = Literal["chain", "pair", "free"]

NUM_LAYERS = 6
WIDTH = 64
CHAINS, CHAIN_LENGTH = 8, 5
NAMES, VALUES = 9, 12
PAIR_SHARE, ROLL_SHARE = 0.55, 0.1
STEPS, BATCH, LENGTH = 360, 12, 64
SEED = 20


@dataclass(frozen=True)
class MicroDocument:
    """Token ids of one document, and beside each id how it could have been known."""

    ids: list[int]
    kinds: list[Kind]


class MicroLanguage:
    """The synthetic language: its words, and documents drawn from it."""

    def __init__(self) -> None:
        chains = [f"k{c}{'abcde'[i]}" for c in range(CHAINS) for i in range(CHAIN_LENGTH)]
        names, values = [f"n{i}" for i in range(NAMES)], [f"v{i}" for i in range(VALUES)]
        self.words = ["<pad>", "<bos>", "<eos>", "<unk>", "roll", *chains, *names, *values]
        self.table = np.random.default_rng(SEED).integers(VALUES, size=(NAMES, NAMES))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by word."""
        return {word: i for i, word in enumerate(self.words)}

    def document(self, rng: np.random.Generator, length: int = LENGTH) -> MicroDocument:
        """Draw one document of exactly ``length`` ids, beginning with ``<bos>``."""
        chain, name, value = self.ids["k0a"], self.ids["n0"], self.ids["v0"]
        ids, kinds = [self.ids["<bos>"]], list[Kind](["free"])
        while len(ids) < length:
            draw = rng.random()
            if draw < PAIR_SHARE:
                one, two = (int(i) for i in rng.integers(NAMES, size=2))
                ids += [name + one, name + two, value + int(self.table[one, two])]
                kinds += ["free", "free", "pair"]
            elif draw < PAIR_SHARE + ROLL_SHARE:
                ids += [self.ids["roll"], value + int(rng.integers(VALUES))]
                kinds += ["free", "free"]
            else:
                first = chain + int(rng.integers(CHAINS)) * CHAIN_LENGTH
                ids += range(first, first + CHAIN_LENGTH)
                kinds += ["free", *["chain"] * (CHAIN_LENGTH - 1)]
        return MicroDocument(ids[:length], kinds[:length])

    def documents(self, count: int, *, seed: int, length: int = LENGTH) -> list[MicroDocument]:
        """Draw ``count`` documents; the same seed gives the same ones."""
        rng = np.random.default_rng(seed)
        return [self.document(rng, length) for _ in range(count)]

    def text(self, document: MicroDocument) -> str:
        """Return the document as text for the tokenizer, without ``<bos>``."""
        return " ".join(self.words[i] for i in document.ids[1:])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a word tokenizer; it adds no special tokens by itself."""
        backend = Tokenizer(models.WordLevel(self.ids, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            unk_token="<unk>",
        )


@dataclass(frozen=True)
class MicroModel:
    """The trained model (float32, frozen) with its language and tokenizer."""

    model: LlamaForCausalLM
    language: MicroLanguage
    tokenizer: PreTrainedTokenizerFast
    seconds: float
    """CPU time that the training took, in seconds."""

    def save(self, folder: Path) -> Path:
        """Write model and tokenizer as a model folder and return its path."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block: the order of every sum is then fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(language: MicroLanguage, *, steps: int = STEPS) -> LlamaForCausalLM:
    """Train the micro model from a fixed seed; equal steps give equal weights."""
    config = LlamaConfig(
        vocab_size=len(language.words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=language.ids["<bos>"],
        eos_token_id=language.ids["<eos>"],
        pad_token_id=language.ids["<pad>"],
    )
    with one_thread(), torch.enable_grad():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = LlamaForCausalLM(config).train()
        rng = np.random.default_rng(SEED)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.15
        )
        for _ in range(steps):
            batch = torch.tensor([language.document(rng).ids for _ in range(BATCH)])
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> MicroModel:
    """The trained micro model; its weights are shared by the workers of one test session."""
    language = MicroLanguage()
    # an xdist worker's own folder lies in one that all workers of the session share
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    folder, clock = shared / "micro-model", shared / "micro-model.json"
    with FileLock(shared / "micro-model.lock"):
        if not clock.exists():
            begun = time.process_time()
            trained = train(language)
            trained.save_pretrained(folder)
            clock.write_text(json.dumps(time.process_time() - begun))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return MicroModel(model, language, language.tokenizer(), json.loads(clock.read_text()))
