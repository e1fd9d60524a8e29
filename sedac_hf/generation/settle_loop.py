"""Decoding over a pass with settled exits: a token that leaves is final, its tail is run later.

Without a cascade nothing leaves: then this is the plain loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sedac_hf.core.exit_check import check_step, hold_by
from sedac_hf.core.exit_step import ExitStep
from sedac_hf.core.session import StepRecord
from sedac_hf.generation.exit_audit import ExitAudit
from sedac_hf.generation.exit_governor import BLOCK
from sedac_hf.generation.logits_processor import scale_exits
from sedac_hf.generation.open_nodes import HeadQueue, OpenNodes

if TYPE_CHECKING:
    from sedac_hf._core import CycleOutcome
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.row_pass import FloatArray, IntArray, Mask, RowPass
    from sedac_hf.core.session import ExitSession
    from sedac_hf.generation.acceptance import TokenChooser
    from sedac_hf.generation.core_cycles import CoreCycles
    from sedac_hf.generation.exit_governor import ExitGovernor
    from sedac_hf.generation.row_state import RowState
    from sedac_hf.generation.row_texts import RowTexts

__all__ = ["SettleLoop"]

# Positions that may wait for a head which is not asked: most texts end before.
_MAX_QUEUE = 512


class SettleLoop:
    """Decodes a batch, one token per row and step; rows leave each by itself.

    What a row says does not depend on when tails are run: K/V are the base's own in any case, and
    the token after an exit is given the exit's own state as feedback, settled or not.
    """

    def __init__(
        self,
        run: RowPass,
        parts: ExitParts,
        session: ExitSession,
        state: RowState,
        texts: RowTexts,
        chooser: TokenChooser,
        last: Tensor,
        *,
        max_pending: int = 8,
        keeps_states: bool = False,
        rests: bool = False,
        core: CoreCycles | None = None,
    ) -> None:
        """Prepare to decode.

        Args:
            run: Runs layers and heads.
            parts: What exits are made of.
            session: The call, with or without a cascade; records of its steps are committed to it.
            state: Where the rows stand.
            texts: The rows' texts.
            chooser: Draws tokens.
            last: The prompt's last final-layer state, `[rows, 1, width]`.
            max_pending: Tokens that may wait for their tails.
            keeps_states: Whether `settle` will be asked for the states of all tokens.
            rests: Whether nobody wants K/V of rows behind their end.
            core: Runs each step in which nobody may leave as one call, where it can be; it taps
                the states that come to checkpoints.
        """
        self._run = run
        self._parts = parts
        self._session = session
        self._state = state
        self._texts = texts
        self._chooser = chooser
        self._last = last
        self._max_pending = max_pending
        self._rests = rests
        self._core = core
        self._full: StepRecord | None = None
        rules = () if session.cascade is None else session.cascade.config.layers
        self._temperatures = [layer.temperature for layer in rules]
        # Heads that have not followed the prompt cannot be asked.
        heads = parts.heads if session.in_step and rules else ()
        self._queues = [HeadQueue(run, k, h.spec.feedback, state) for k, h in enumerate(heads)]
        self._stops = [head.layer_idx + 1 for head in heads]
        self._watch = session.watch
        self._audit: ExitAudit | None = None
        if self._watch is not None:
            self._audit = ExitAudit(run, parts, self._watch, self._temperatures)
        passing = None if self._audit is None else self._audit.passing
        self._open = OpenNodes(run, state, self._stops, self._queues, passing)
        self._tokens = np.zeros(state.rows, np.int64)
        self._outputs: list[Tensor] | None = [] if keeps_states and heads else None
        self.tails = state.rows  # times that the last layer was run for a row, the prompt's once

    def decode(self, logits: Tensor, governor: ExitGovernor | None = None) -> None:
        """Go on until every row has stopped.

        Args:
            logits: The base's logits behind the prompt, `[rows, vocabulary]`.
            governor: Says for each block of steps whether exits act; None lets them always act.
        """
        self._choose(logits, self._full_depth())
        while not self._texts.done.all():
            if governor is None:
                self._advance(True, BLOCK)
            else:
                self._block(governor)

    def _block(self, governor: ExitGovernor) -> None:
        """Some steps with exits or without, as the governor says; it learns what they took."""
        acts, whole = governor.begin(), not self._texts.done.any()
        spent = {True: [0.0, 0], False: [0.0, 0]}
        left = BLOCK
        while left > 0 and not self._texts.done.all():
            # Catching up with tokens that have left is a cost of exits.
            counts = spent[acts or len(self._open) > 0]
            begun = time.perf_counter()
            given = self._advance(acts, left)
            counts[0] += time.perf_counter() - begun
            counts[1] += given
            left -= given
        # Steps of fewer rows say little of what those of a whole batch take.
        for key, (seconds, steps) in spent.items() if whole else ():
            governor.end(key, int(steps), seconds)

    def _advance(self, acts: bool, most: int) -> int:
        """One token for every row that goes on, or `most` where one call gives several.

        Args:
            acts: Whether exits act.
            most: Tokens of a row at most.

        Returns:
            How many were given.
        """
        if self._core is not None:
            if not (acts and self._stops) and not len(self._open):
                outcomes = self._core.run(most=most)
                for outcome in outcomes:
                    self._take(self._core, outcome)
                return len(outcomes)
            self._core.begin_anew()
        if self._rests:
            self._run.rest(self._texts.done)
        output, record = self._step(acts)
        if self._chooser.takes_best(self._texts) and not self._session.follows_entropy:
            self._say(self._run.best(output)[0][:, 0], output, record)
        else:
            self._choose(self._run.logits(output)[:, 0], record)
        return 1

    def _take(self, core: CoreCycles, outcome: CycleOutcome) -> None:
        """Take over a step of the core, in which all go through every layer."""
        record = self._full_depth()
        going = self._commit(record)
        core.say(outcome)
        if self._stops:
            *states, last = core.tapped(outcome)
            for queue, hidden in zip(self._queues, states, strict=True):
                queue.add(hidden, self._last)
            self._last = last
            self._fill_long_queues()
        for row, words in zip(outcome.rows, outcome.words, strict=True):
            self._tokens[row] = words[-1]
        self.tails += len(outcome.rows)
        self._tell(record, going)

    def settle(self) -> Tensor:
        """Run everything that still waits, heads included.

        Returns:
            Each token's state for the final norm, `[rows, tokens, width]`, if they were kept.
        """
        if len(self._open):
            self._finish()
        for queue in self._queues:
            if len(queue):
                queue.fill()
        return torch.cat([self._last[:, :0], *(self._outputs or [])], dim=1)

    def _step(self, acts: bool) -> tuple[Tensor, StepRecord]:
        """Each row's state for the final norm, and what was decided."""
        tokens = torch.from_numpy(self._tokens[:, None].copy())
        hidden = self._open.add(tokens, self._last)
        if not self._stops or not acts:
            return self._whole_step()
        step, looks = self._begin(hidden)
        for k, stop in enumerate(self._stops):
            asks = step.spread_at(k) is not None
            hidden = self._open.advance(stop, (stop,) if asks else ())
            if step.tries(k, hidden, self._open.spread):
                step.leave(k, self._queues[k].flush())
            elif len(self._queues[k]) >= _MAX_QUEUE:
                self._queues[k].fill()
            if step.all_left:
                break
        if self._audit is not None:
            self._audit.note(len(self._open) - 1, step)
        if not step.all_left or len(self._open) > self._max_pending:
            hidden = self._finish()
        if looks and self._watch is not None:
            check_step(
                step, step.held >= 0, hidden, self._run.logits, self._temperatures, self._watch
            )
        return self._kept(step.output(hidden)), step.record

    def _whole_step(self) -> tuple[Tensor, StepRecord]:
        """A step in which nobody may leave."""
        output = self._kept(self._finish())
        self._fill_long_queues()
        return output, self._full_depth()

    def _fill_long_queues(self) -> None:
        for queue in self._queues:
            if len(queue) >= _MAX_QUEUE:
                queue.fill()

    def _full_depth(self) -> StepRecord:
        """The record of a step in which nobody may leave; nobody writes to it."""
        if self._full is None:
            depth, heads = self._parts.shell.num_layers, len(self._parts.heads)
            self._full = StepRecord.full_depth(self._state.rows, depth, heads)
        return self._full

    def _kept(self, output: Tensor) -> Tensor:
        """Note what the rows' tokens ended with."""
        self._last = output
        if self._outputs is not None:
            self._outputs.append(output)
        return output

    def _begin(self, hidden: Tensor) -> tuple[ExitStep, bool]:
        """The step, and whether its exits are only looked at."""
        rule = None if self._watch is None else self._watch.look()
        hold = None if rule is None or self._watch is None else hold_by(self._watch, None)
        step = ExitStep(
            self._parts, self._session, hidden, None, self._texts.done,
            rule=rule, hold=hold, follows=self._watch is not None, chance=self._chance,
            tokens=self._tokens,
        )  # fmt: skip
        return step, rule is not None

    def _chance(self, states: Tensor) -> FloatArray:
        """Largest probability that exits give to a word, `[rows, 1]`."""
        return self._run.draft_top(states, 1)[1][..., 0]

    def _finish(self) -> Tensor:
        observed = () if self._audit is None else self._audit.observed
        hidden = self._open.advance(self._parts.shell.num_layers, observed)
        if self._audit is not None:
            self._audit.settle(self._open.states)
        self._open.close()
        self.tails += int((~self._texts.done).sum())
        return hidden

    def _choose(self, logits: Tensor, record: StepRecord) -> None:
        """Draw the next token of every row that goes on, and commit the step."""
        going = self._commit(record)
        self._session.note(record, logits)
        scores = scale_exits(logits.float(), record.checkpoints, self._temperatures)
        rows = np.flatnonzero(going).tolist()
        self._tokens[rows] = self._chooser.choose(self._texts, rows, scores[rows])
        self._tell(record, going)

    def _say(self, words: IntArray, output: Tensor, record: StepRecord) -> None:
        """Give every row that goes on its best word `[rows]`, and commit the step."""
        going, texts = self._commit(record), self._texts
        for row in np.flatnonzero(going).tolist():
            word = int(words[row])
            if self._chooser.allows(texts, row, word):
                texts.append(row, word)
            else:
                logits = self._run.logits(output[row : row + 1])[:, 0]
                [word] = self._chooser.choose(texts, [row], logits)
            self._tokens[row] = word
        self._tell(record, going)

    def _commit(self, record: StepRecord) -> Mask:
        """Rows that go on, `[rows]`."""
        self._session.pending = record
        depth, heads = self._parts.shell.num_layers, len(self._parts.heads)
        going = ~self._texts.done
        self._session.commit(self._state.rows, depth, heads, going)
        return going

    def _tell(self, record: StepRecord, going: Mask) -> None:
        if self._session.meter is not None:
            self._session.meter.step(record, self._tokens.copy(), going)
