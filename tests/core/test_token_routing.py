from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sedac_hf.core.token_routing import (
    TOKEN_CLASSES,
    UNKNOWN_CLASS,
    classes_of,
    token_class,
    token_classes,
)
from sedac_hf.errors import ConfigError

TEXTS = [
    "The café costs 123 euros, and the cafés 4567!\n\tNaïve unbelievable words",
    "été \u4f60\u597d",
]


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return fast(tokenizer, eos_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "<0x0A>", "<0xE4>", "▁the", "the", "▁12", "7", "▁", "▁,", "▁(", ")."]
    vocabulary = [(piece, -float(at)) for at, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>")


def wordpiece() -> PreTrainedTokenizerFast:
    pieces = ["[PAD]", "[UNK]", "play", "##ing", "##s", "12", "##34", ".", "##"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    return fast(tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def named(tokenizer: PreTrainedTokenizerFast, vocabulary: int | None = None) -> dict[str, str]:
    table = token_classes(tokenizer, vocabulary or len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return {piece: TOKEN_CLASSES[kind] for piece, kind in zip(pieces, table, strict=False)}


def test_byte_level_pieces():
    found = named(byte_level())
    assert found["<|end|>"] == "special"
    assert (found["Ġthe"], found["T"], found["e"]) == ("word", "continuation", "continuation")
    assert (found["1"], found["!"], found["Ċ"], found["Ġ"]) == ("number", "mark", "mark", "mark")
    assert found["Ã"] == "continuation"  # half of an é
    assert {"ĠcafÃ©"} <= found.keys()
    assert found["ĠcafÃ©"] == "word"


def test_sentencepiece_pieces():
    found = named(sentencepiece())
    assert (found["<unk>"], found["<s>"]) == ("special", "special")
    assert (found["▁the"], found["the"]) == ("word", "continuation")
    assert (found["▁12"], found["7"]) == ("number", "number")
    assert {found[p] for p in ("<0x0A>", "▁", "▁,", "▁(", ").")} == {"mark"}
    assert found["<0xE4>"] == "continuation"


def test_wordpiece_pieces():
    found = named(wordpiece())
    assert (found["[PAD]"], found["[UNK]"]) == ("special", "special")
    assert (found["play"], found["##ing"], found["##s"]) == ("word", "continuation", "continuation")
    assert (found["12"], found["##34"], found["."], found["##"]) == (
        "number", "number", "mark", "mark",
    )  # fmt: skip


def test_added_tokens_and_ids_beyond_the_tokenizer():
    tokenizer = wordpiece()
    tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("hello", special=False)])
    table = token_classes(tokenizer, 20)
    assert table.shape == (20,)
    assert table.dtype == np.uint8
    assert [TOKEN_CLASSES[kind] for kind in table[9:]] == ["special", "word", *["special"] * 9]
    assert len(token_classes(tokenizer, 4)) == 4
    with pytest.raises(ConfigError, match="at least one"):
        token_classes(tokenizer, 0)


@pytest.mark.parametrize(
    ("text", "begins", "kind"),
    [
        (" word", True, "word"), ("ing", False, "continuation"), ("3rd", True, "word"),
        (" 42", True, "number"), ("½", False, "number"), ("...", False, "mark"),
        ("\n\n  ", False, "mark"), ("", True, "special"), ("你好", False, "continuation"),
    ],
)  # fmt: skip
def test_classes_of_pieces(text, begins, kind):
    assert token_class(text, begins=begins) == kind


def test_ids_that_are_not_in_the_table_are_unknown():
    table = np.array([0, 3, 4], np.uint8)
    found = classes_of(table, np.array([2, 0, 3, -1, 1]))
    assert found.tolist() == [4, 0, UNKNOWN_CLASS, UNKNOWN_CLASS, 3]


@pytest.mark.reference
def test_the_reference_tokenizer():
    from transformers import AutoTokenizer

    from tests.test_examples import script

    tokenizer = AutoTokenizer.from_pretrained(script("get_reference_model").DEFAULT_FOLDER)
    found = named(tokenizer, 49152)
    for piece, kind in (
        ("Ġthe", "word"), ("ing", "continuation"), ("1", "number"), ("Ċ", "mark"),
        ("<|im_end|>", "special"), (",", "mark"),
    ):  # fmt: skip
        assert found[piece] == kind, piece
