"""Texts that the base writes itself, so that `fit` needs no data set."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from sedac_hf.calibration.documents import Document, append_documents, read_documents
from sedac_hf.calibration.progress import progress_bar
from sedac_hf.core.support import own_draw
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM

logger = logging.getLogger(__name__)

# Half of the user's turns start from nothing; the others are nudged so that code, extraction and
# plain explanation are all present even in a short draw.
USER_OPENINGS = (
    "", "", "", "", "", "", "", "",
    "Write a Python function that", "Write a Python program to", "Explain how", "What is",
    "Summarize the following text:", "Write a short story about", "How do I", "Rewrite",
)  # fmt: skip
TEXT_OPENINGS = (
    "", "", "", "", "The", "In", "A", "How to", "def ", "import ", "When", "#", "It is",
    "Question:", "For example,", "Chapter 1",
)  # fmt: skip
ANSWER_TEMPERATURES = (0.3, 0.7, 1.0)
_MARK = "\u2063user-turn\u2063"


@dataclass(frozen=True)
class ChatTemplate:
    """The fixed parts of a chat around the user's turn, as token ids."""

    opening: list[int]
    middle: list[int]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
        """Cut the tokenizer's template around the user's turn; None when it has no template."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        text = cast(
            "str",
            tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
            ),
        )
        opening, found, middle = text.partition(_MARK)
        if not found or not middle:
            raise CalibrationError(
                "the chat template does not repeat the user's words, so the base cannot write "
                "its own texts; pass texts=... (`sedac fit --data`)"
            )

        def encode(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False)["input_ids"])

        return cls(encode(opening), encode(middle))


class RowSampler(LogitsProcessor):
    """Draws a word of each row at that row's temperature, and leaves no other a chance.

    Only the most probable words can be drawn. Nucleus sampling would sort the whole vocabulary of
    every row, and transformers' own sampling draws a random number for each word of it; on a CPU
    either costs as much as the model.
    """

    by_row = True

    def __init__(self, temperatures: Sequence[float], words: int = 64) -> None:
        """Keep one temperature for each row.

        Args:
            temperatures: The temperatures.
            words: How many of the most probable words can be drawn.
        """
        self._temperatures = torch.tensor(temperatures).unsqueeze(-1)
        self._words = words

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """See `transformers.LogitsProcessor`."""
        top = scores.topk(min(self._words, scores.shape[-1]), -1)
        warm = top.values / self._temperatures.to(scores.device, scores.dtype)
        drawn = torch.multinomial(warm.softmax(-1), 1)
        chosen = top.indices.gather(-1, drawn)
        kept = torch.full_like(scores, -torch.inf)
        return kept.scatter_(-1, chosen, scores.gather(-1, chosen))


def write_texts(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    tokens: int,
    seed: int = 0,
    rows: int = 64,
    max_turn: int = 48,
    max_answer: int = 160,
    deadline: float | None = None,
    progress: bool = True,
) -> list[Document]:
    """Let the base write documents until there are `tokens` of them or time is up.

    A chat model is given its template's opening and writes the user's turn as well as the answer.
    A base model starts from its first token and from short prefixes. Each batch has its own seed,
    so a resumed call writes what an uninterrupted one would have written.

    Args:
        base: The frozen base model.
        tokenizer: Its tokenizer.
        path: JSON-lines file to append to; what is there already counts.
        tokens: How many tokens to write in all.
        seed: Seed of the draw.
        rows: Sequences written together.
        max_turn: Most tokens of a user's turn.
        max_answer: Most tokens of an answer or of a plain text.
        deadline: `time.monotonic()` value after which no further batch is begun.
        progress: Show a progress bar.

    Returns:
        All documents of the file, duplicates and looping texts left out.

    Raises:
        CalibrationError: If most of what the base writes is empty, repeated or looping.
    """
    documents = read_documents(path)
    marker = path.with_suffix(".batches")
    batch = int(marker.read_text()) if marker.exists() else 0
    template = ChatTemplate.from_tokenizer(tokenizer)
    known = {document.hash for document in documents}
    written = kept = 0
    have = sum(map(len, documents))
    bar = progress_bar(tokens, "texts", "tok", initial=have, shown=progress)
    writer = _plain_writer(base)
    while have < tokens and (deadline is None or time.monotonic() < deadline):
        with own_draw(base.device), torch.inference_mode():
            torch.manual_seed(seed * 1_000_003 + batch)
            if template is None:
                fresh = _plain_batch(writer, tokenizer, rows, max_answer, batch)
            else:
                fresh = _chat_batch(writer, tokenizer, template, rows, max_turn, max_answer, batch)
        good = [d for d in fresh if d.hash not in known and not is_looping(d)]
        good = list({d.hash: d for d in good}.values())
        append_documents(path, good)
        batch += 1
        marker.write_text(str(batch))
        known.update(d.hash for d in good)
        documents.extend(good)
        written, kept = written + rows, kept + len(good)
        fresh_tokens = sum(map(len, good))
        have += fresh_tokens
        bar.update(fresh_tokens)
        if written >= 2 * rows and kept < written / 3:
            raise CalibrationError(
                f"only {kept} of {written} texts that the base wrote were usable (the others were "
                "empty, repeated or looping); pass texts=... (`sedac fit --data`)"
            )
    bar.close()
    return documents


def answer_prompts(
    base: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_answer: int = 160,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 16,
) -> list[Document]:
    """Let the base answer prompts, by sampling.

    Args:
        base: The frozen base model.
        prompts: Token ids of each prompt, at least one.
        max_answer: Most tokens of an answer.
        temperature: Temperature of the sampling.
        seed: Seed of the draw.
        rows: Prompts answered together.

    Returns:
        Prompts with their answers, in order; those whose answer is shorter than 8 tokens or loops
        are left out.
    """
    writer = _plain_writer(base)
    stop = _stop_ids(writer, None)
    found: list[Document] = []
    with own_draw(base.device), torch.inference_mode():
        torch.manual_seed(seed)
        for at in range(0, len(prompts), rows):
            some = [list(prompt) for prompt in prompts[at : at + rows]]
            answers = _continue(writer, some, max_answer, stop, [temperature] * len(some))
            pairs = zip(some, answers, strict=True)
            found += [Document(np.asarray(p + a), len(p)) for p, a in pairs if len(a) >= 8]
    return [document for document in found if not is_looping(document)]


def is_looping(document: Document, *, order: int = 4, least_distinct: float = 0.4) -> bool:
    """Whether a text has collapsed: too few of its n-grams are distinct."""
    ids = document.ids[document.prompt_length :]
    if ids.size < 4 * order:
        return False
    grams = np.lib.stride_tricks.sliding_window_view(ids, order)
    return len(np.unique(grams, axis=0)) < least_distinct * len(grams)


def _chat_batch(
    writer: SedacForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rows: int,
    max_turn: int,
    max_answer: int,
    batch: int,
) -> list[Document]:
    openings = [USER_OPENINGS[(batch * rows + i) % len(USER_OPENINGS)] for i in range(rows)]
    starts = [list(tokenizer(o, add_special_tokens=False)["input_ids"]) for o in openings]
    prompts = [template.opening + start for start in starts]
    stop = _stop_ids(writer, template.middle[0])
    turns = _continue(writer, prompts, max_turn, stop)
    users = [start + turn for start, turn in zip(starts, turns, strict=True)]
    prompts = [template.opening + user + template.middle for user in users if len(user) >= 3]
    # Every batch holds every temperature: few texts are then like many.
    temperatures = [ANSWER_TEMPERATURES[i % len(ANSWER_TEMPERATURES)] for i in range(len(prompts))]
    answers = _continue(writer, prompts, max_answer, stop, temperatures)
    pairs = zip(prompts, answers, strict=True)
    return [Document(np.asarray(p + a), len(p)) for p, a in pairs if len(a) >= 8]


def _plain_batch(
    writer: SedacForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    max_answer: int,
    batch: int,
) -> list[Document]:
    first = tokenizer.bos_token_id
    if first is None:
        first = tokenizer.eos_token_id
    head = [] if first is None else [int(first)]
    prompts = []
    for i in range(rows):
        opening = TEXT_OPENINGS[(batch * rows + i) % len(TEXT_OPENINGS)]
        prompt = head + list(tokenizer(opening, add_special_tokens=False)["input_ids"])
        if not prompt:  # no first token is known: begin from a random word of the vocabulary
            prompt = [int(torch.randint(writer.config.get_text_config().vocab_size, ()))]
        prompts.append(prompt)
    stop = _stop_ids(writer, None)
    texts = _continue(writer, prompts, max_answer, stop)
    pairs = zip(prompts, texts, strict=True)
    return [Document(np.asarray(p + t), len(p)) for p, t in pairs if len(t) >= 8]


def _plain_writer(base: PreTrainedModel) -> SedacForCausalLM:
    """The base in our loop without exits: on a CPU a third of the time that `generate` takes."""
    from sedac_hf.modeling import SedacForCausalLM

    return SedacForCausalLM.from_base(base, mode="plain")


def _stop_ids(writer: SedacForCausalLM, extra: int | None) -> list[int]:
    own = writer.generation_config
    known: Any = own.eos_token_id if own else None
    ids = {int(i) for i in (known if isinstance(known, list) else [known]) if i is not None}
    return sorted(ids | ({extra} if extra is not None else set()))


def _continue(
    writer: SedacForCausalLM,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: list[int],
    temperatures: Sequence[float] | None = None,
) -> list[list[int]]:
    """Sample one continuation of each prompt, cut before the first stop token.

    Each prompt has its own temperature; without any, all have 1.
    """
    width = max(map(len, prompts))
    pad = stop[0] if stop else 0
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generate: Any = writer.generate
    out: Tensor = generate(
        ids.to(writer.device),
        attention_mask=mask.to(writer.device),
        sedac_mode="plain",
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=[RowSampler(temperatures or [1.0] * len(prompts))],
        eos_token_id=stop or None,
        pad_token_id=pad,
    )
    ends = set(stop)
    texts = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:end])
    return texts
