"""What tests of saving and loading share: bases and artefacts on disk, a certificate."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sedac_hf.artefact_format import CONFIG_FILE, read_artefact, write_artefact
from sedac_hf.calibration.bounds import RiskTarget, TestResult
from sedac_hf.calibration.certificate import Certificate, HeldOutCheck, Rung
from sedac_hf.calibration.policy_search import Policy
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import VOCABULARY, build_tiny, prompt
from tests.wrapping import wrap

KINDS = {0: "feedback", 1: "lens", 2: "block"}
RULES = [LayerConfig(0, 0.5), LayerConfig(1, 2.0), LayerConfig(2, 2.5, weight=1.5)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w05{% endif %}"
)


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of as many words (w00, w01, ...) as the tiny models know."""
    words = {f"w{i:02d}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w03"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="w01",
        eos_token="w02",
        pad_token="w00",
        unk_token="w03",
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_base(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a tiny Llama with its tokenizer."""
    build_tiny("llama", seed, dtype, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load_base(folder: Path | str, **options: Any) -> PreTrainedModel:
    """Load a base, from a folder or by name, as transformers does."""
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return base


def wrap_base(base: PreTrainedModel, **values: Any) -> SedacForCausalLM:
    """A wrapper with three checkpoints whose weights survive being stored."""
    torch.manual_seed(7)  # lenses begin with random maps
    draft = torch.arange(0, VOCABULARY, 2)
    model = wrap(base, KINDS, RULES, draft_vocabulary=draft, **values)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))  # heads are stored in bf16
    return model


def issue(
    cascade: CascadeConfig | None = None, *, passes: bool = True, **values: Any
) -> Certificate:
    """A certificate as if the rules had been tested."""
    cascade = cascade or CascadeConfig(RULES)
    p_value = 0.01 if passes else 0.5
    result = TestResult(
        mean=0.004,
        clipped_mean=0.004,
        beyond_clip=0,
        p_betting=p_value,
        p_hoeffding_bentkus=1.0,
        p_tail=p_value / 2,
    )
    fields: dict[str, Any] = {
        "target": RiskTarget(),
        "walk": (Rung(Policy(cascade, 0.003, 0.2, 0.8), result, 0.2, 25.0),),
        "accepted": int(passes),
        "documents": 260,
        "left_out": 0,
        "dtype": "float32",
        "kv_mode": "propagate",
        "splits": {"certification": "ff" * 32},
        "needed_documents": None if passes else 400,
        "held_out": HeldOutCheck(80, 0.0031, (0.001, 0.005), 0.2, True) if passes else None,
    }
    return Certificate(**(fields | values))


def load(folder: Path, **options: Any) -> SedacForCausalLM:
    """The artefact in a folder."""
    return SedacForCausalLM.from_pretrained(folder, **options)


def tokens(model: Any, **options: Any) -> Tensor:
    """What a model writes greedily."""
    return model.generate(prompt(2, 5), max_new_tokens=12, do_sample=False, **options)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of an artefact's configuration."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> None:
    """Write the artefact anew, checksums included, as a faulty program would."""
    files = read_artefact(folder, "artefact")
    write_artefact(folder, files.config | changes, tensors, None)


def warnings_in(caplog: pytest.LogCaptureFixture) -> str:
    """Warnings and errors that were logged."""
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
