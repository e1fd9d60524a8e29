"""Kinds of tokens: which way through the cascade a token may take depends on what was just read.

The class is that of the token at the position itself, the one that was read last. It is known
before the first layer runs; the token that will be predicted is not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKEN_CLASSES", "UNKNOWN_CLASS", "classes_of", "token_class", "token_classes"]

# Their order is stored in artefacts.
TOKEN_CLASSES: Final = ("word", "continuation", "number", "mark", "special")
UNKNOWN_CLASS: Final = 255

Classes = npt.NDArray[np.uint8]

_BYTE_PIECES = ("Ġ", "Ċ", "ĉ")
_SPACE_PIECE = "\u2581"
_SUFFIX_MARK = "##"


def token_classes(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Classes:
    """Class of every token of a tokenizer: byte-level BPE, sentencepiece or wordpiece.

    Args:
        tokenizer: The tokenizer.
        vocabulary: Rows of the table; ids that the tokenizer does not know are special.

    Returns:
        Indices into `TOKEN_CLASSES`, `[vocabulary]`.

    Raises:
        ConfigError: If `vocabulary` is not positive.
    """
    if vocabulary < 1:
        raise ConfigError(f"a vocabulary needs at least one token, found {vocabulary}.")
    known = min(vocabulary, len(tokenizer))
    pieces = list(tokenizer.convert_ids_to_tokens(list(range(known))))
    style = _style(piece for piece in pieces if isinstance(piece, str))
    special = set(tokenizer.all_special_ids)
    special |= {
        at for at, added in tokenizer.added_tokens_decoder.items() if getattr(added, "special", 0)
    }
    table = np.full(vocabulary, TOKEN_CLASSES.index("special"), np.uint8)
    for at, piece in enumerate(pieces):
        if at in special or not isinstance(piece, str):
            continue
        text, begins = _text_of(piece, style)
        table[at] = TOKEN_CLASSES.index(token_class(text, begins=begins))
    return table


def token_class(text: str, *, begins: bool) -> str:
    """Class of a piece of text.

    Args:
        text: The piece, its space before it included.
        begins: Whether it begins a word rather than going on with one.

    Returns:
        `"mark"` for whitespace and punctuation, `"number"` for a piece whose letters are all
        digits, `"word"` or `"continuation"` for the rest; `"special"` for no text at all.
    """
    if not text:
        return "special"
    kinds = {unicodedata.category(letter)[0] for letter in text.strip()}
    if "L" in kinds or "M" in kinds:
        return "word" if begins else "continuation"
    if "N" in kinds:
        return "number"
    # Half of a letter's bytes goes on with whatever came before.
    return "continuation" if "\ufffd" in text else "mark"


def classes_of(table: Classes, tokens: npt.NDArray[np.int64]) -> Classes:
    """Classes of some tokens; `UNKNOWN_CLASS` for ids that the table does not have.

    Args:
        table: What `token_classes` gives.
        tokens: Token ids, any shape.
    """
    known = (tokens >= 0) & (tokens < len(table))
    found = table[np.where(known, tokens, 0)]
    return np.where(known, found, np.uint8(UNKNOWN_CLASS)).astype(np.uint8)


def _style(pieces: Iterable[str]) -> str:
    """How a vocabulary writes word boundaries."""
    counts = dict.fromkeys(("bytes", "space", "suffix"), 0)
    for piece in pieces:
        counts["bytes"] += piece.startswith(_BYTE_PIECES)
        counts["space"] += piece.startswith(_SPACE_PIECE)
        counts["suffix"] += piece.startswith(_SUFFIX_MARK)
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "plain"


def _text_of(piece: str, style: str) -> tuple[str, bool]:
    """Text of a piece, and whether it begins a word."""
    if style == "bytes":
        text = _from_bytes(piece)
        return text, text[:1].isspace()
    if style == "space":
        if piece.startswith("<0x") and piece.endswith(">"):
            return _decoded([int(piece[3:-1], 16)]), False
        text = piece.replace(_SPACE_PIECE, " ")
        return text, text[:1].isspace()
    if style == "suffix":
        continues = piece.startswith(_SUFFIX_MARK) and piece != _SUFFIX_MARK
        return piece.removeprefix(_SUFFIX_MARK) if continues else piece, not continues
    return piece, True


def _from_bytes(piece: str) -> str:
    """What a piece of byte-level BPE stands for; the piece itself where it is no such piece."""
    table = _byte_letters()
    if any(letter not in table for letter in piece):
        return piece
    return _decoded([table[letter] for letter in piece])


def _decoded(values: Sequence[int]) -> str:
    return bytes(values).decode("utf-8", errors="replace")


@cache
def _byte_letters() -> dict[str, int]:
    """Byte of each letter by which byte-level BPE writes it (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {
        chr(256 + at): value for at, value in enumerate(hidden)
    }
