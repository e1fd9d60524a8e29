"""Training of exit heads: KL to the full model's distribution, on states read from disk."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.calibration.documents import batches_of
from sedac_hf.calibration.head_progress import HeadProgress
from sedac_hf.calibration.head_schedule import HeadReport, HeadSchedule
from sedac_hf.calibration.progress import progress_bar
from sedac_hf.calibration.states import (
    BaseStates,
    DocumentBatch,
    iter_logits,
    template_call,
)
from sedac_hf.calibration.word_sampler import WordSampler
from sedac_hf.calibration.work_sizes import fast_products
from sedac_hf.core.exit_heads import ExitBlock
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.calibration.head_progress import HeadProgressFile
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead

logger = logging.getLogger(__name__)

_WARM_UP = 0.03
_SIZED = 8  # documents whose states tell their usual size


def train_head(
    head: ExitHead,
    shell: BaseShell,
    states: BaseStates,
    rows: Sequence[int],
    held_out: Sequence[int],
    draft: Tensor,
    schedule: HeadSchedule,
    *,
    kept: HeadProgressFile | None = None,
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
        schedule: How long to train; what an interrupted training had taken comes on top.
        kept: Where the training is kept now and then, and goes on from; None for nowhere.
        progress: Show a progress bar.

    Returns:
        What it came to.

    Raises:
        CalibrationError: If there is nothing to train on or the loss is not finite.
    """
    if not rows or not held_out:
        raise CalibrationError("no documents to train an exit head on; pass more texts")
    training = _Training(head, shell, states, rows, draft, schedule)
    done = training.run(kept, progress=progress)
    head.requires_grad_(False).eval()
    agreement, stand_in, top = measure_agreement(head, shell, states, held_out)
    losses = done.losses
    report = HeadReport(
        layer_idx=head.layer_idx,
        feedback=head.spec.feedback,
        steps=len(losses),
        tokens=done.tokens,
        seconds=done.seconds,
        loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
        agreement=agreement,
        stand_in_agreement=stand_in,
        top=top,
    )
    logger.info("%s", report)
    return report


class _Training:
    """The training of one head."""

    def __init__(
        self,
        head: ExitHead,
        shell: BaseShell,
        states: BaseStates,
        rows: Sequence[int],
        draft: Tensor,
        schedule: HeadSchedule,
    ) -> None:
        self._head, self._shell, self._states, self._rows = head, shell, states, rows
        self._schedule = schedule
        self._sampler = WordSampler(shell, draft)
        self._parameters = [p.requires_grad_() for p in head.parameters()]
        self._optimiser = torch.optim.AdamW(
            _groups(head, _usual_size(states, rows)),
            schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.01,
        )  # fmt: skip

    def run(self, kept: HeadProgressFile | None, *, progress: bool) -> HeadProgress:
        """Train to the end of the schedule, from where an interrupted training was."""
        head, schedule = self._head, self._schedule
        at = HeadProgress() if kept is None else kept.load(head, self._optimiser)
        torch.manual_seed(schedule.seed + len(at.losses))
        total = schedule.epochs * sum(len(self._states.documents[i]) for i in self._rows)
        spent, start, saved = at.seconds, time.monotonic(), time.monotonic()
        bar = progress_bar(100, f"head {head.layer_idx}", "%", shown=progress)
        head.train()
        batches = _endless_batches(self._states, self._rows, schedule)
        for chosen in itertools.islice(batches, len(at.losses), None):
            done = max(at.tokens / total, at.seconds / (spent + schedule.seconds))
            if done >= 1:
                break
            loss, tokens = self._step(chosen, _pace(done))
            at.losses.append(loss)
            if not math.isfinite(loss):
                raise CalibrationError(
                    f"training the head after layer {head.layer_idx} diverged at step "
                    f"{len(at.losses)}; lower the learning rate"
                )
            at.tokens += tokens
            at.seconds = spent + time.monotonic() - start
            if kept is not None and time.monotonic() - saved > kept.every:
                kept.save(head, self._optimiser, at)
                saved = time.monotonic()
            bar.update(round(100 * done) - bar.n)
            bar.set_postfix(loss=f"{np.mean(at.losses[-20:]):.3f}", refresh=False)
        bar.close()
        return at

    def _step(self, chosen: list[int], pace: float) -> tuple[float, int]:
        """One step; its loss, and its tokens."""
        head, shell, optimiser = self._head, self._shell, self._optimiser
        for group in optimiser.param_groups:
            group["lr"] = self._schedule.learning_rate * group["faster"] * pace
        batch = self._states.batch(chosen, head.layer_idx, shell.base.device)
        real = batch.mask.bool()
        optimiser.zero_grad(set_to_none=True)
        with fast_products(shell.base.device):
            exited = exit_states(head, shell, batch, mixed=True)
            loss = self._sampler.loss(
                exited[real], batch.top_ids[real], batch.top_probabilities[real]
            )
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        optimiser.step()
        return float(loss.detach()), int(real.sum())


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
