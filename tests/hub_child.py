"""A process of its own that knows a loopback server as the Hub, and what it does there.

`huggingface_hub` reads its settings when it is imported, so what talks to the server runs in a
process of its own. The functions `in_child_*` are what that process does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ARTEFACT = "user/tiny-sedac"
BASE = "org/tiny-base"


class Child:
    """A process that knows the server as the Hub."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start it with the given environment variables added to ours."""
        self._saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            self._pool.submit(os.getpid).result()  # the process starts with the first task
        finally:
            for name, value in self._saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of a module there; its exceptions arrive here."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End it."""
        self._pool.shutdown()


def in_child_save_base(folder: str, seed: int) -> None:
    from tests.artefacts import save_base

    save_base(Path(folder), seed)


def in_child_push(repo: str, options: dict[str, Any]) -> list[int]:
    from tests.artefacts import issue, load_base, wrap_base

    model = wrap_base(load_base(BASE))
    model.push_to_hub(repo, certificate=issue(), **options)
    return write(model)


def in_child_load(repo: str, options: dict[str, Any]) -> dict[str, Any]:
    from sedac_hf import SedacForCausalLM

    model = SedacForCausalLM.from_pretrained(repo, **options)
    return {
        "tokens": write(model),
        "exit_share": model.exit_stats.exit_share,
        "base": model.config.base_model_name_or_path,
        "revision": model.config.base_model_revision,
        "heads": len(model.exit_heads),
        "mode": model.config.mode,
    }


def in_child_load_error(repo: str, options: dict[str, Any]) -> tuple[list[str], str]:
    try:
        in_child_load(repo, options)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return [], ""


def in_child_load_and_push(source: str, repo: str, options: dict[str, Any]) -> None:
    from sedac_hf import SedacForCausalLM

    SedacForCausalLM.from_pretrained(source).push_to_hub(repo, **options)


def in_child_pipeline(repo: str) -> tuple[str, str]:
    from transformers import pipeline

    import sedac_hf  # noqa: F401  (registers the model with transformers)

    generator = pipeline("text-generation", model=repo, device="cpu")
    text = generator("w05 w09 w11", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    return type(generator.model).__name__, text


def in_child_auto_class(repo: str, trust_remote_code: bool) -> tuple[bool, str]:
    import sys

    from transformers import AutoModelForCausalLM

    before = "sedac_hf" in sys.modules
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=trust_remote_code)
    return before, type(model).__name__


def in_child_validate_card(repo: str) -> None:
    from huggingface_hub import ModelCard

    ModelCard.load(repo).validate()


def in_child_save(base: str, folder: str) -> str | None:
    """Wrap a loaded base and save: which commit of it is pinned?"""
    from tests.artefacts import load_base, wrap_base

    wrap_base(load_base(base)).save_pretrained(folder)
    revision: str | None = json.loads(Path(folder, "config.json").read_text())[
        "base_model_revision"
    ]
    return revision


def in_child_push_uncertified(repo: str) -> None:
    from tests.artefacts import load_base, wrap_base

    wrap_base(load_base(BASE)).push_to_hub(repo)


def in_child_save_and_push(folder: str, repo: str) -> None:
    from sedac_hf import SedacForCausalLM

    SedacForCausalLM.from_pretrained(ARTEFACT).save_pretrained(
        folder, push_to_hub=True, repo_id=repo, commit_message="Saved and pushed"
    )


def write(model: Any) -> list[int]:
    from tests.tiny_models import prompt

    tokens: list[int] = model.generate(prompt(1, 5), max_new_tokens=10, do_sample=False)[0].tolist()
    return tokens
