"""Training of exit heads: KL to the full model's distribution, on states read from disk."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sedac_hf.calibration.documents import batches_of
from sedac_hf.calibration.head_schedule import HeadReport, HeadSchedule
from sedac_hf.calibration.states import (
    BaseStates,
    DocumentBatch,
    iter_logits,
    template_call,
)
from sedac_hf.calibration.work_sizes import fast_products
from sedac_hf.core.exit_heads import ExitBlock
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead

logger = logging.getLogger(__name__)

_SAMPLED_WORDS = 512  # words outside the draft vocabulary that stand for all the others
_WARM_UP = 0.03
_SIZED = 8  # documents whose states tell their usual size


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
        # On the meta device no random weights are drawn only to be replaced, 30 ms a step.
        biased = self._head.bias is not None
        rows = nn.Linear(self._head.in_features, len(words), bias=biased, device="meta")
        rows.weight = nn.Parameter(self._head.weight.detach()[words], requires_grad=False)
        if biased:
            rows.bias = nn.Parameter(self._head.bias.detach()[words], requires_grad=False)
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


def train_head(
    head: ExitHead,
    shell: BaseShell,
    states: BaseStates,
    rows: Sequence[int],
    held_out: Sequence[int],
    draft: Tensor,
    schedule: HeadSchedule,
    *,
    progress: bool = True,
) -> HeadReport:
    """Train one head in place on the frozen base's recorded states.

    A head with feedback is trained both ways: half of the positions are given the previous
    position's true final state, the others the head's own output there, as inside a run of exits.

    Args:
        head: The head, float32.
        shell: Shell of the base, float32.
        states: Recorded states.
        rows: Documents to train on.
        held_out: Documents to measure agreement on.
        draft: Draft vocabulary, token ids.
        schedule: How long to train.
        progress: Show a progress bar.

    Returns:
        What it came to.

    Raises:
        CalibrationError: If there is nothing to train on or the loss is not finite.
    """
    if not rows or not held_out:
        raise CalibrationError("no documents to train an exit head on; pass more texts")
    torch.manual_seed(schedule.seed)
    sampler = WordSampler(shell, draft)
    parameters = [p.requires_grad_() for p in head.parameters()]
    optimiser = torch.optim.AdamW(
        _groups(head, _usual_size(states, rows)),
        schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.01,
    )  # fmt: skip
    total = schedule.epochs * sum(len(states.documents[i]) for i in rows)
    start, tokens, losses = time.monotonic(), 0, list[float]()
    bar = tqdm(total=100, desc=f"head {head.layer_idx}", unit="%", disable=not progress)
    head.train()
    for chosen in _endless_batches(states, rows, schedule):
        done = max(tokens / total, (time.monotonic() - start) / schedule.seconds)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * group["faster"] * _pace(done)
        batch = states.batch(chosen, head.layer_idx, shell.base.device)
        real = batch.mask.bool()
        optimiser.zero_grad(set_to_none=True)
        with fast_products(shell.base.device):
            exited = exit_states(head, shell, batch, mixed=True)
            loss = sampler.loss(exited[real], batch.top_ids[real], batch.top_probabilities[real])
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise CalibrationError(
                f"training the head after layer {head.layer_idx} diverged at step {len(losses)}; "
                "lower the learning rate"
            )
        tokens += int(real.sum())
        bar.update(round(100 * done) - bar.n)
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
    bar.close()
    seconds = time.monotonic() - start
    head.requires_grad_(False).eval()
    agreement, stand_in, top = measure_agreement(head, shell, states, held_out)
    report = HeadReport(
        layer_idx=head.layer_idx,
        feedback=head.spec.feedback,
        steps=len(losses),
        tokens=tokens,
        seconds=seconds,
        loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
        agreement=agreement,
        stand_in_agreement=stand_in,
        top=top,
    )
    logger.info("%s", report)
    return report


def exit_states(
    head: ExitHead, shell: BaseShell, batch: DocumentBatch, *, mixed: bool = False
) -> Tensor:
    """Run a head over whole documents.

    Args:
        head: The head.
        shell: Shell of the base.
        batch: The documents and their states.
        mixed: Give half of the positions the head's own output as feedback.

    Returns:
        Exit states, ``[rows, seq, width]``.
    """
    layer = head.spec.resolved(shell.num_layers).template_layer
    call = template_call(shell, batch, layer) if head.cache_layers else None
    feedback = None
    if head.spec.feedback:
        feedback = _shifted(batch.final)
        if mixed:
            with torch.no_grad():
                own = _shifted(head(batch.states, call, feedback=feedback))
            feedback = torch.where(
                torch.rand(own.shape[:2], device=own.device).unsqueeze(-1) < 0.5, own, feedback
            )
    out: Tensor = head(batch.states, call, feedback=feedback)
    return out


@torch.inference_mode()
def measure_agreement(
    head: ExitHead, shell: BaseShell, states: BaseStates, rows: Sequence[int]
) -> tuple[float, float | None, dict[int, float]]:
    """Share of continuation tokens on which the exit, over the whole vocabulary, agrees.

    Args:
        head: The head.
        shell: Shell of the base.
        states: Recorded states.
        rows: Documents to measure on.

    Returns:
        Agreement of the first choice; the same with the head's own output as feedback (None
        without feedback); and the hit rate among the first 2, 4 and 8.
    """
    layer = head.spec.resolved(shell.num_layers).template_layer
    hits, stand_in_hits, tokens = {1: 0, 2: 0, 4: 0, 8: 0}, 0, 0
    for chosen in batches_of(states.documents, rows, 4096):
        batch = states.batch(chosen, head.layer_idx, shell.base.device)
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        counted = batch.mask.bool() & (position >= batch.prompt_lengths[:, None])
        exited = exit_states(head, shell, batch)
        teacher = batch.top_ids[counted][:, :1]
        ranked = _ranked(shell, exited[counted])
        tokens += len(teacher)
        for n in hits:
            hits[n] += int((ranked[:, :n] == teacher).any(-1).sum())
        if head.spec.feedback:
            call = template_call(shell, batch, layer)
            second = head(batch.states, call, feedback=_shifted(exited))
            stand_in_hits += int((_ranked(shell, second[counted])[:, :1] == teacher).sum())
    rates = {n: hit / max(tokens, 1) for n, hit in hits.items()}
    stand_in = stand_in_hits / max(tokens, 1) if head.spec.feedback else None
    return rates.pop(1), stand_in, rates


def _ranked(shell: BaseShell, states: Tensor) -> Tensor:
    states = states.to(shell.base.dtype)
    best = [logits.topk(8, -1).indices for _, logits in iter_logits(shell, states)]
    return torch.cat(best) if best else torch.empty(0, 8, dtype=torch.long, device=states.device)


def _full_loss(
    shell: BaseShell, exited: Tensor, top_ids: Tensor, top_probabilities: Tensor
) -> Tensor:
    logits = shell.logits(exited.to(shell.base.dtype).unsqueeze(0)).squeeze(0)
    log_q = torch.log_softmax(logits.float(), -1)
    return -(top_probabilities * log_q.gather(-1, top_ids)).sum(-1).mean()


def _groups(head: ExitHead, size: float) -> list[dict[str, Any]]:
    """Parameters with how many times the learning rate they are given.

    A block begins as one of the base's last layers, which is used to states of `size`. States at an
    early checkpoint are far smaller, and the map in front of the block, which makes up for it, sees
    inputs of size 1: its weights have as much further to go.
    """
    mix = list(head.mix.parameters()) if isinstance(head, ExitBlock) else []
    taken = {id(each) for each in mix}
    rest = [each for each in head.parameters() if id(each) not in taken]
    groups = [{"params": rest, "faster": 1.0}, {"params": mix, "faster": max(size, 1.0)}]
    return [group for group in groups if group["params"]]


def _usual_size(states: BaseStates, rows: Sequence[int]) -> float:
    """Median over tokens of the root mean square of the base's final states."""
    batch = states.batch(list(rows[:_SIZED]), states.checkpoints[0])
    squares = batch.final[batch.mask.bool()].float().square().mean(-1)
    return float(squares.median().sqrt())


def _shifted(states: Tensor) -> Tensor:
    """The previous position's state at each position, zeros at the first."""
    return nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]


def _pace(done: float) -> float:
    """Warm-up, then a cosine down to a twentieth."""
    if done < _WARM_UP:
        return max(done, 1e-3) / _WARM_UP
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _endless_batches(
    states: BaseStates, rows: Sequence[int], schedule: HeadSchedule
) -> Iterator[list[int]]:
    rng = np.random.default_rng(schedule.seed)
    while True:
        # Neighbours in length share a batch, with enough jitter that batches differ each time.
        length = np.array([len(states.documents[i]) for i in rows])
        order = np.argsort(length + rng.uniform(0, 32, len(rows)))
        batches = list(
            batches_of(states.documents, [rows[i] for i in order], schedule.batch_tokens)
        )
        for i in rng.permutation(len(batches)):
            yield batches[i]
