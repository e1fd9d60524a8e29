"""The loss of heads: cross entropy against the teacher's words, over a sample of the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sedac_hf.core.draft_head import rows_of

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["WordSampler"]

_SAMPLED_WORDS = 512  # words outside the draft vocabulary that stand for all the others


class WordSampler:
    """Output rows to train against: the draft vocabulary, the teacher's words, and a sample.

    A product with the whole vocabulary would cost ten times the block itself. The words outside
    the draft vocabulary are sampled uniformly and their logits raised by the log of the inverse
    sampling rate, so that the normaliser is that of the whole vocabulary in expectation.
    """

    def __init__(self, shell: BaseShell, draft: Tensor) -> None:
        """Prepare for a base and a draft vocabulary.

        Args:
            shell: Shell of the base.
            draft: Token ids of the draft vocabulary, ``[words]``.
        """
        self._shell = shell
        self._vocabulary = int(shell.base.config.get_text_config().vocab_size)
        device = shell.base.device
        self._is_draft = torch.zeros(self._vocabulary, dtype=torch.bool, device=device)
        self._is_draft[draft.to(device)] = True
        head: Any = shell.base.get_output_embeddings()
        self._head = head if type(head) is nn.Linear and not head.weight.is_meta else None

    def loss(self, exited: Tensor, top_ids: Tensor, top_probabilities: Tensor) -> Tensor:
        """Cross entropy of the exit against the teacher's most probable words.

        Args:
            exited: Exit states, ``[tokens, width]``.
            top_ids: The teacher's words, ``[tokens, TOP]``.
            top_probabilities: Their probabilities, ``[tokens, TOP]``.

        Returns:
            Mean loss, nats.
        """
        if self._head is None:
            return _full_loss(self._shell, exited, top_ids, top_probabilities)
        words, raise_by = self._sample(top_ids)
        rows = rows_of(self._head, words)
        exited = exited.to(self._head.weight.dtype)
        logits = self._shell.logits(exited.unsqueeze(0), vocabulary=rows).squeeze(0)
        log_q = torch.log_softmax(logits.float() + raise_by, -1)
        place = torch.zeros(self._vocabulary, dtype=torch.long, device=words.device)
        place[words] = torch.arange(len(words), device=words.device)
        return -(top_probabilities * log_q.gather(-1, place[top_ids])).sum(-1).mean()

    def _sample(self, top_ids: Tensor) -> tuple[Tensor, Tensor]:
        taken = self._is_draft.clone()
        taken[top_ids.flatten()] = True
        certain = taken.nonzero().squeeze(-1)
        rest = (~taken).nonzero().squeeze(-1)
        drawn = rest[torch.randperm(len(rest), device=rest.device)[:_SAMPLED_WORDS]]
        raise_by = torch.zeros(len(certain) + len(drawn), device=rest.device)
        if len(drawn):
            raise_by[len(certain) :] = math.log(len(rest) / len(drawn))
        return torch.cat([certain, drawn]), raise_by


def _full_loss(
    shell: BaseShell, exited: Tensor, top_ids: Tensor, top_probabilities: Tensor
) -> Tensor:
    logits = shell.logits(exited.to(shell.base.dtype).unsqueeze(0)).squeeze(0)
    log_q = torch.log_softmax(logits.float(), -1)
    return -(top_probabilities * log_q.gather(-1, top_ids)).sum(-1).mean()
