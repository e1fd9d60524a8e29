"""The output layer restricted to the draft vocabulary."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sedac_hf.core.weights import WeightWatch, is_plain_linear
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["DraftHead", "rows_of"]


class DraftHead:
    """Rows of the base's output layer for the tokens of the draft vocabulary."""

    def __init__(self, shell: BaseShell, tokens: Tensor | None) -> None:
        """Check the vocabulary against the base.

        Args:
            shell: Shell of the base.
            tokens: Token ids `[draft vocabulary]`, int64, or None for the whole vocabulary.

        Raises:
            ConfigError: If ids are of another type, repeated or outside the base's vocabulary.
        """
        self._shell = shell
        self._tokens = tokens
        self._linear: nn.Linear | None = None
        self._watch: WeightWatch | None = None
        if tokens is not None:
            _check_tokens(tokens, int(shell.base.config.vocab_size))
        self.prepare()

    @property
    def linear(self) -> nn.Linear | None:
        """The smaller output layer; None when the base's whole head is to be used."""
        return self._linear

    @property
    def tokens(self) -> Tensor | None:
        """Token ids that `linear` scores, `[draft vocabulary]`; None for all of the base's."""
        return None if self._linear is None else self._tokens

    def extended(self, tokens: Tensor) -> DraftHead:
        """The same with the tokens of a prompt beside it.

        Args:
            tokens: Token ids of any shape.
        """
        if self._linear is None or self._tokens is None:
            return self
        known = self._tokens.to(tokens.device)
        more = torch.unique(tokens)
        more = more[~torch.isin(more, known)]
        if not len(more):
            return self
        own = self._linear
        added = rows_of(cast(nn.Linear, self._shell.base.get_output_embeddings()), more)
        larger = copy.copy(self)
        larger._tokens = torch.cat([known, more])
        larger._linear = _joined(own, added)
        return larger

    def prepare(self) -> None:
        """Take the rows anew if the base's head has changed.

        A head that is no plain `nn.Linear` (adapted, quantised, offloaded) is used whole.
        """
        if self._tokens is None:
            return
        head: nn.Module | None = self._shell.base.get_output_embeddings()
        if not is_plain_linear(head):
            self._linear, self._watch = None, None
            return
        plain = cast(nn.Linear, head)
        tensors: list[Tensor] = [plain.weight, *([] if plain.bias is None else [plain.bias])]
        if self._watch is not None and self._watch.unchanged(tensors):
            return
        # What is kept must be usable outside of inference mode too.
        with torch.inference_mode(False):
            self._linear = rows_of(plain, self._tokens)
        self._watch = WeightWatch(tensors)


@torch.no_grad()
def rows_of(head: nn.Linear, tokens: Tensor) -> nn.Linear:
    """The rows of an output layer that belong to some tokens, as a layer of its own.

    Args:
        head: The output layer.
        tokens: Token ids `[words]`.

    Returns:
        A frozen layer to `words` outputs. None of its weights is drawn at random first.
    """
    tokens = tokens.to(head.weight.device)
    rows: dict[str, Any] = {"device": "meta", "dtype": head.weight.dtype}
    small = nn.Linear(head.in_features, len(tokens), bias=head.bias is not None, **rows)
    small.weight = nn.Parameter(head.weight.detach()[tokens], requires_grad=False)
    if head.bias is not None:
        small.bias = nn.Parameter(head.bias.detach()[tokens], requires_grad=False)
    return small


@torch.no_grad()
def _joined(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One layer with the rows of two."""
    count = first.out_features + second.out_features
    rows: dict[str, Any] = {"device": "meta", "dtype": first.weight.dtype}
    both = nn.Linear(first.in_features, count, bias=first.bias is not None, **rows)
    weight = torch.cat([first.weight, second.weight])
    both.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        both.bias = nn.Parameter(torch.cat([first.bias, second.bias]), requires_grad=False)
    return both


def _check_tokens(tokens: Tensor, vocab_size: int) -> None:
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or tokens.numel() == 0:
        raise ConfigError(
            "The draft vocabulary must be a non-empty int64 tensor of one dimension, found "
            f"{tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise ConfigError(
            f"The draft vocabulary has ids from {int(tokens.min())} to {int(tokens.max())}, but "
            f"the base knows 0 to {vocab_size - 1}. Was it made for another tokenizer?"
        )
    if len(torch.unique(tokens)) != len(tokens):
        raise ConfigError("The draft vocabulary names a token more than once.")
