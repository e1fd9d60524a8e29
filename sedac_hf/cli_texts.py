"""Texts for the commands: from a file, from a data set, or written by the base itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.texts import write_texts
from sedac_hf.cli_support import REPOSITORY, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.cli_load import Loaded
    from sedac_hf.cli_support import Screen

__all__ = ["BUNDLED_TEXTS", "documents_for", "read_records", "read_texts"]

BUNDLED_TEXTS = REPOSITORY / "examples" / "eval_texts.jsonl"
# Seeds of texts to evaluate on start here, far from those that `fit` draws with.
_EVAL_SEED = 1_000_000
_MAX_LENGTH = 512
_TOKENS_PER_TEXT = 120

Record = Mapping[str, Any]


def read_records(source: str, limit: int | None = None, *, option: str = "--data") -> list[Record]:
    """Read texts from a file or a data set.

    A `.jsonl` line is an object with `text`, or `prompt` and `completion`, or `messages`; in any
    other file, texts are set apart by blank lines. What is no file is taken as a data set on the
    Hub (`name` or `name:split`) with one of those columns.

    Args:
        source: Path or data set.
        limit: Most records to read.
        option: Where the user named the source, for messages.

    Returns:
        The records.

    Raises:
        UsageError: If there is nothing to read, or it has another form.
    """
    path = Path(source)
    if path.is_file():
        found = _jsonl(path) if path.suffix in (".jsonl", ".json") else _plain(path)
    elif path.exists() or path.suffix in (".jsonl", ".json", ".txt"):
        raise UsageError(f"{option} {source}: there is no such file.")
    else:
        found = _data_set(source, option)
    records: list[Record] = []
    for record in found:
        if limit is not None and len(records) >= limit:
            break
        records.append(record)
    if not records:
        raise UsageError(f"{option} {source} holds no texts.")
    return records


def read_texts(
    source: str, tokenizer: PreTrainedTokenizerBase, *, option: str = "--data"
) -> list[str]:
    """Read whole texts: prompt and completion joined, messages put through the chat template."""
    records = read_records(source, option=option)
    return ["".join(_parts(record, tokenizer)) for record in records]


def documents_for(
    loaded: Loaded, data: str | None, count: int, *, seed: int, screen: Screen
) -> tuple[list[Document], str]:
    """Documents to evaluate a model on.

    Args:
        loaded: The model.
        data: File or data set; None takes the bundled texts where they were written by this base,
            else lets the base write new ones.
        count: Most documents.
        seed: Seed of what the base writes.
        screen: For progress.

    Returns:
        The documents, and in words where they are from.

    Raises:
        UsageError: If there is none of at least two tokens.
    """
    base_name = str(loaded.model.config.base_model_name_or_path or "")
    known_base = Path(base_name).name == "smollm2-135m-instruct"
    if data is None and known_base and BUNDLED_TEXTS.is_file():
        data, origin = str(BUNDLED_TEXTS), "texts the base wrote with a seed of their own"
    elif data is None:
        return _written(loaded, count, seed, screen), "texts the base wrote for this"
    else:
        origin = Path(data).name
    documents = []
    for record in read_records(data, count):
        head, rest = _parts(record, loaded.tokenizer)
        document = _document(head, rest, loaded.tokenizer)
        if document is not None:
            documents.append(document)
    if not documents:
        raise UsageError(f"{data} holds no text of at least two tokens.")
    return documents, origin


def _written(loaded: Loaded, count: int, seed: int, screen: Screen) -> list[Document]:
    with tempfile.TemporaryDirectory() as folder:
        written = write_texts(
            loaded.model.base,
            loaded.tokenizer,
            Path(folder) / "texts.jsonl",
            tokens=count * _TOKENS_PER_TEXT,
            seed=_EVAL_SEED + seed,
            rows=min(32, count),
            progress=screen.progress,
        )
    return written[:count]


def _document(head: str, rest: str, tokenizer: PreTrainedTokenizerBase) -> Document | None:
    if head:
        prompt = list(tokenizer(head, add_special_tokens=False)["input_ids"])
        ids = prompt + list(tokenizer(rest, add_special_tokens=False)["input_ids"])
    else:
        prompt, ids = [], list(tokenizer(rest)["input_ids"])
    ids = ids[:_MAX_LENGTH]
    if len(ids) < 2 or len(prompt) >= len(ids):
        return None
    return Document(np.asarray(ids, dtype=np.int64), len(prompt))


def _parts(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before the part that counts, and that part."""
    if isinstance(record.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("the data holds chats, but the tokenizer has no chat template.")
        *before, last = record["messages"]
        template: Any = tokenizer.apply_chat_template
        head = template(before, tokenize=False, add_generation_prompt=True) if before else ""
        return head, str(last["content"])
    if "prompt" in record and "completion" in record:
        return str(record["prompt"]), str(record["completion"])
    if "text" in record:
        return "", str(record["text"])
    raise UsageError(
        f"a record has the fields {sorted(record)}; expected text, or prompt and completion, or "
        "messages."
    )


def _jsonl(path: Path) -> Iterable[Record]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(record, dict):
                raise UsageError(f"{path}, line {number}: expected an object, found {record!r:.40}")
            yield record


def _plain(path: Path) -> Iterable[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    return ({"text": part.strip()} for part in text.split("\n\n") if part.strip())


def _data_set(source: str, option: str) -> Iterable[Record]:
    try:
        load_dataset: Any = import_module("datasets").load_dataset
    except ImportError as error:
        raise UsageError(
            f"{option} {source} is no file; data sets of the Hub need `pip install sedac-hf[eval]`."
        ) from error
    name, _, split = source.partition(":")
    try:
        rows: Iterable[Record] = load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library raises errors of many kinds, all about the data set
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{option} {source} is no file, and no such data set could be loaded: {reason}"
        ) from error
    return rows
