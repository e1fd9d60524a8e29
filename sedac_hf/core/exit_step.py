"""Who leaves at which checkpoint in one decode step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.cascade_state import StepContext
from sedac_hf.core.session import StepRecord

if TYPE_CHECKING:
    from sedac_hf.core.attention_spread import Spread
    from sedac_hf.core.cascade_controller import CascadeController, CheckpointDecision
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.session import ExitSession

__all__ = ["ExitStep", "checkpoint_decision", "risks_of", "top_probability"]

Mask = npt.NDArray[np.bool_]
# Logits that are held at once when only their largest probability is wanted.
_MAX_LOGITS = 1 << 24


class ExitStep:
    """Who is still on the way in one decode step, and with which state the others left.

    Attributes:
        all_left: Whether nobody is on the way any more.
        record: What was decided for each row.
        left: Rows that have left, or ended before, broadcastable to `[rows, 1, width]`; None
            before the first exit.
        held: Checkpoint at which each row would have left but was run on, `[rows]`; -1 for none.
    """

    def __init__(
        self,
        parts: ExitParts,
        session: ExitSession,
        hidden: Tensor,
        eligible: Mask | None,
        done: Mask | None = None,
        *,
        rule: CascadeController | None = None,
        hold: Callable[[Mask], Mask] | None = None,
        follows: bool = False,
        chance: Callable[[Tensor], npt.NDArray[np.float32]] | None = None,
        tokens: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Begin a step.

        Args:
            parts: What exits are made of.
            session: The call that the step belongs to; it has a cascade.
            hidden: Embeddings `[rows, 1, width]`.
            eligible: Rows that may leave, `[rows]`; None for all.
            done: Rows whose texts have ended and for whom nobody waits, `[rows]`; None for none.
            rule: Rules in place of the session's.
            hold: Picks, of the rows that leave, those that are run on all the same, to see what
                full depth says.
            follows: Whether rows that have left come to later checkpoints all the same, and their
                risks there are wanted.
            chance: Largest probability that exit states `[rows, 1, width]` give to a word of the
                draft vocabulary, `[rows, 1]`; None to ask the base's modules.
            tokens: Ids of the tokens that are read in this step, `[rows]`; None if not known.
        """
        rows = hidden.shape[0]
        assert session.cascade is not None
        self._parts = parts
        self._cascade: CascadeController = session.cascade if rule is None else rule
        self._hold = hold
        self._chance = partial(top_probability, parts) if chance is None else chance
        self.held = np.full(rows, -1, np.int64)
        self._held_exits: Tensor | None = None
        self._follows = follows
        self._before = hidden[:, 0]
        history = session.history_of(rows)
        self._state = self._cascade.start(
            rows,
            StepContext(
                before=self._before,
                tokens=tokens,
                uncertainty=None if history is None else history.uncertainty,
                bonus=None if history is None else history.bonus,
            ),
        )
        self._active = np.ones(rows, np.bool_) if eligible is None else eligible.copy()
        self._gone = np.zeros(rows, np.bool_) if done is None else done.copy()
        self._active = self._active & ~self._gone
        self._asks = bool(self._active.any())
        self._try = np.zeros(rows, np.bool_)
        self.all_left = False
        self._exits: Tensor | None = None
        depth = parts.shell.num_layers
        self.record = StepRecord.full_depth(rows, depth, len(parts.heads))
        self._later = self.record.risks.copy()
        self.left: Tensor | None = None

    def spread_at(self, k: int) -> Spread | None:
        """What the layer of checkpoint `k` is to fill in; None where nobody looks at it."""
        return self._cascade.spread_at(k) if self._asks or self._is_following else None

    def tries(self, k: int, hidden: Tensor, spread: Tensor | None = None) -> bool:
        """Ask the cascade about checkpoint `k`.

        Args:
            k: Which checkpoint.
            hidden: States there, `[rows, 1, width]`.
            spread: How evenly the rows attend in its layer, `[rows]`, where `spread_at` asks.

        Returns:
            Whether any row is to try its head.
        """
        tries = self._asks and self._ask(k, hidden, spread)
        if self._is_following:
            self._follow(k, hidden, spread)
        self._before = hidden[:, 0]
        return tries

    @property
    def _is_following(self) -> bool:
        """Whether risks are wanted of rows that need not be asked any more."""
        return self._held_exits is not None or (self._follows and self._exits is not None)

    def _ask(self, k: int, hidden: Tensor, spread: Tensor | None) -> bool:
        decision = checkpoint_decision(
            self._parts, self._cascade, k, hidden[:, 0], self._state, self._active, spread
        )
        record = self.record
        record.risks[:, k] = decision.risk
        record.confidences[:, k] = decision.confidence
        record.tries[:, k] = self._try = decision.try_exit
        return decision.tries > 0

    def _follow(self, k: int, hidden: Tensor, spread: Tensor | None) -> None:
        """Note the risks at checkpoint `k` of rows that need not be asked any more."""
        found = risks_of(self._parts, self._cascade, k, hidden[:, 0], self._before, spread)
        held = (self.held >= 0) & (self.held < k)
        left = (self.record.checkpoints >= 0) & (self.record.checkpoints < k)
        self.record.risks[held, k] = found[held]
        self._later[left, k] = found[left]

    def leave(self, k: int, exit_states: Tensor) -> None:
        """Let the rows go that try at checkpoint `k` and whose exit is sure enough."""
        leaving = self._try
        least = self._cascade.least_probability(k, self._state)
        if least is not None:
            # Only rows that try need logits.
            picked = exit_states[torch.from_numpy(leaving).to(exit_states.device)]
            probability = np.full(len(leaving), np.nan, np.float32)
            probability[leaving] = self._chance(picked)[:, 0]
            probability = self._cascade.sureness(k, probability, self._state)
            self.record.probabilities[leaving, k] = probability[leaving]
            leaving = leaving & (probability >= least)
        if not leaving.any():
            return
        self._active = self._active & ~leaving
        self._asks = bool(self._active.any())
        if self._hold is not None:
            leaving = leaving & ~self._held_back(k, leaving, exit_states)
            if not leaving.any():
                return
        self._gone = self._gone | leaving
        self.all_left = bool(self._gone.all())
        self.record.layers[leaving] = self._parts.heads[k].layer_idx
        self.record.checkpoints[leaving] = k
        self._exits = _put(leaving, exit_states, self._exits)
        self.left = torch.from_numpy(self._gone).to(exit_states.device).view(-1, 1, 1)

    def exit_states(self, rows: Mask) -> Tensor:
        """States for the final norm with which rows left, or would have, `[n, 1, width]`."""
        places = torch.from_numpy(np.flatnonzero(rows))
        found = self._held_exits if (self.held[rows] >= 0).any() else self._exits
        assert found is not None
        return found[places.to(found.device)]

    def known_risks(self, rows: Mask) -> npt.NDArray[np.float32]:
        """Risk at every checkpoint as far as it is known, `[n, checkpoints]`."""
        risks = self.record.risks[rows]
        return np.where(np.isnan(risks), self._later[rows], risks)

    def _held_back(self, k: int, leaving: Mask, exit_states: Tensor) -> Mask:
        """Rows that are run on although they would leave."""
        assert self._hold is not None
        held = self._hold(leaving)
        if held.any():
            self.held[held] = k
            self._held_exits = _put(held, exit_states, self._held_exits)
        return held

    def output(self, hidden: Tensor) -> Tensor:
        """Each row's state for the final norm."""
        if self._exits is None or self.left is None:
            return hidden
        exits = self._exits.to(hidden.device)
        return torch.where(self.left.to(hidden.device), exits, hidden)


def checkpoint_decision(
    parts: ExitParts,
    cascade: CascadeController,
    k: int,
    states: Tensor,
    state: Any,
    active: Mask,
    spread: Tensor | None = None,
) -> CheckpointDecision:
    """Risk, normalised confidence and whether to try, for each row at checkpoint `k`.

    Args:
        parts: What exits are made of.
        cascade: The cascade.
        k: Index of the checkpoint.
        states: Hidden states `[rows, width]`.
        state: What the cascade has accumulated for these rows.
        active: Rows that are still asked, `[rows]`.
        spread: How evenly the rows attend in the checkpoint's layer, `[rows]`; None if that is not
            known.

    Returns:
        The decision; NaN risk and confidence, and no try, for rows that are not asked.
    """
    if states.device.type == "cpu" or cascade.fuses:
        return cascade.step(k, states, state, active, spread)
    decision = cascade.step_risk(k, parts.probes.risk(k, states), state, active)
    risk = np.where(active, decision.risk, np.float32(np.nan))
    return decision._replace(risk=risk)


def risks_of(
    parts: ExitParts,
    cascade: CascadeController,
    k: int,
    states: Tensor,
    before: Tensor | None = None,
    spread: Tensor | None = None,
) -> npt.NDArray[np.float32]:
    """Risk of each row at checkpoint `k`, whoever has left.

    Args:
        parts: What exits are made of.
        cascade: A cascade with the probes.
        k: Index of the checkpoint.
        states: Hidden states `[rows, width]`.
        before: States of the same rows at the checkpoint before, or embeddings.
        spread: How evenly the rows attend, as for `checkpoint_decision`.

    Returns:
        Risks, `[rows]`; NaN where they need something that is not known.
    """
    if states.device.type == "cpu" or cascade.fuses:
        return cascade.risks(k, states, before, spread)
    return np.asarray(parts.probes.risk(k, states).detach().cpu(), np.float32)


def _put(rows: Mask, states: Tensor, into: Tensor | None) -> Tensor:
    """`into`, if there is one, with the states of some rows put in."""
    if into is None:
        return states
    here = torch.from_numpy(rows).to(states.device).view(-1, 1, 1)
    return torch.where(here, states, into.to(states.device))


def top_probability(parts: ExitParts, exit_states: Tensor) -> npt.NDArray[np.float32]:
    """Largest probability that an exit gives to a word of the draft vocabulary.

    Args:
        parts: What exits are made of.
        exit_states: States for the final norm, `[rows, seq, width]`.

    Returns:
        Probabilities `[rows, seq]`; NaN where the logits are not finite.
    """
    vocabulary = parts.draft.linear
    width = vocabulary.out_features if vocabulary is not None else parts.shell.vocabulary_size
    chunk = max(1, _MAX_LOGITS // (width * max(1, exit_states.shape[0])))
    found = []
    for at in range(0, exit_states.shape[1], chunk):
        part = exit_states[:, at : at + chunk]
        logits = parts.shell.logits(part, vocabulary=vocabulary).float()
        found.append((logits.amax(-1) - logits.logsumexp(-1)).exp())
    # Decisions carry no gradient.
    return np.asarray(torch.cat(found, dim=1).detach().cpu(), np.float32)
