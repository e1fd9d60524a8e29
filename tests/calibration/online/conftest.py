"""A micro model fitted on texts of one kind, and what lets it write others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedac_hf.calibration.fit_settings import FitSettings
from sedac_hf.calibration.fitting import fit
from sedac_hf.calibration.safe_rules import with_thresholds
from sedac_hf.config import CheckpointSpec
from sedac_hf.modeling import SedacForCausalLM
from tests.calibration.online.watching import TOKENS, Write
from tests.micro_model import CHAIN_LENGTH, CHAINS, NAMES, VALUES, MicroModel

SETTINGS = FitSettings(
    checkpoints=(CheckpointSpec(1),),
    budget_seconds=600.0,
    draft_words=64,
    probe_rank=8,
    costs="parameters",
    epochs=6.0,
    learning_rate=3e-3,
    epsilon=0.06,
    storage="whole",
)


@pytest.fixture(scope="session")
def artefact(micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted on chains alone; its certificate walks from stricter thresholds to those it chose."""
    rng = np.random.default_rng(5)
    letters = "abcde"[:CHAIN_LENGTH]
    texts = [
        " ".join(f"k{c}{x}" for c in rng.integers(CHAINS, size=9) for x in letters)
        for _ in range(260)
    ]
    output = tmp_path_factory.mktemp("online") / "artefact"
    model, _ = fit(
        micro_model.model,
        texts,
        tokenizer=micro_model.tokenizer,
        output_dir=output,
        settings=SETTINGS,
        progress=False,
    )
    assert model.certificate is not None
    first = model.certificate.walk[0]
    stricter = {each.layer_idx: each.threshold / 2 for each in first.policy.cascade.layers}
    safer = replace(first.policy, cascade=with_thresholds(first.policy.cascade, stricter))
    walked = replace(
        model.certificate,
        walk=(replace(first, policy=safer), *model.certificate.walk),
        accepted=model.certificate.accepted + 1,
    )
    model.save_pretrained(output, tokenizer=micro_model.tokenizer, certificate=walked)
    return output


@pytest.fixture
def model(artefact: Path, micro_model: MicroModel) -> SedacForCausalLM:
    return SedacForCausalLM.from_pretrained(artefact, base_model=micro_model.model)


@pytest.fixture
def write(model: SedacForCausalLM, micro_model: MicroModel) -> Write:
    """Lets a model write texts of one kind."""
    ids = micro_model.language.ids
    code = [ids[f"k{c}a"] for c in range(CHAINS)]
    names = [ids[f"n{i}"] for i in range(NAMES)]
    prose = [*names, ids["roll"], *(ids[f"v{i}"] for i in range(VALUES))]
    never = [ids[word] for word in ("<pad>", "<bos>", "<eos>", "<unk>")]

    def run(kind: str, seed: int = 0, mode: str = "certified", by: Any = model) -> torch.Tensor:
        heads, others = (code, prose) if kind == "code" else (names, code)
        prompt = torch.tensor([[ids["<bos>"], heads[row % 8]] for row in range(8)])
        torch.manual_seed(seed)
        return by.generate(
            prompt,
            max_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            suppress_tokens=[*never, *others],
            eos_token_id=None,
            pad_token_id=0,
            sedac_mode=mode,
        )

    return run
