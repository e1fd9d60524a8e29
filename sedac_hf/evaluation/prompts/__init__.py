"""Prompts to measure with, written for this repository; nothing is fitted on them.

Chat and code are single requests. A grounded prompt asks to summarise, edit or extract from a text
that stands in the prompt, so that the answer repeats parts of it.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROMPT_GROUPS", "encode_prompt", "load_prompts"]

PROMPT_GROUPS = ("chat", "code", "grounded")


def load_prompts(group: str, count: int | None = None) -> list[str]:
    """Read the prompts of a group.

    Args:
        group: One of `PROMPT_GROUPS`.
        count: How many; evenly spaced ones when there are more, all when there are fewer or None
            is given.

    Returns:
        The prompts, in their order.

    Raises:
        ConfigError: If the group is unknown, `count` is below 1, or the file is damaged.
    """
    if group not in PROMPT_GROUPS:
        raise ConfigError(f"a prompt group must be one of {PROMPT_GROUPS}, found {group!r}.")
    if count is not None and count < 1:
        raise ConfigError(f"the number of prompts must be at least 1, found {count}.")
    source = files(__name__) / f"{group}.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    prompts = [_prompt(line, f"{group}.jsonl, line {at}") for at, line in enumerate(lines, 1)]
    if count is None or count >= len(prompts):
        return prompts
    picks = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    return [prompts[at] for at in picks]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, *, system: str | None = None, raw: bool = False
) -> list[int]:
    """Token ids of a prompt, as a chat where the tokenizer knows one.

    Args:
        tokenizer: The tokenizer.
        text: The prompt.
        system: System message of the chat.
        raw: Leave the chat template out.

    Returns:
        Token ids, possibly none.

    Raises:
        ConfigError: If a system message is given and there is no chat.
    """
    if getattr(tokenizer, "chat_template", None) and not raw:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        template: Any = tokenizer.apply_chat_template
        chat = template(messages, add_generation_prompt=True, return_dict=True)
        return list(chat["input_ids"])
    if system:
        raise ConfigError("a system message needs a chat template, and there is none here.")
    return list(tokenizer(text)["input_ids"])


def _prompt(line: str, where: str) -> str:
    """One line's prompt: `prompt`, or `task` and `text` below it."""
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON; install sedac_hf again.") from error
    parts: list[Any] = []
    if isinstance(record, dict):
        names = ("prompt",) if "prompt" in record else ("task", "text")
        parts = [record.get(name) for name in names]
    if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ConfigError(
            f"{where} must hold a prompt, or a task and a text, none of them empty; install "
            "sedac_hf again."
        )
    return "\n\n".join(parts)
