"""What exact mode knows for nothing: each exit of the drafting head beside the verified state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.cascade_config import CascadeConfig
from sedac_hf.core.cascade_controller import CascadeController
from sedac_hf.core.exit_check import judged
from sedac_hf.core.exit_step import checkpoint_decision, top_probability
from sedac_hf.core.probe_inference import ProbeManager

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CheckpointDecision
    from sedac_hf.core.cascade_state import CascadeState
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.observers import ExitWatch
    from sedac_hf.core.probe_inference import LREProbe
    from sedac_hf.core.row_pass import RowPass

__all__ = ["HeadWatch"]


class HeadWatch:
    """Holds what one head says of verified tokens against the base's own states.

    Only the head that drafts is run, so its checkpoint is judged as if it were the only one, by the
    rules for all classes of tokens. Where its risk needs the states of the checkpoint before, which
    a draft does not run, or how evenly its layer attends, which nobody looks at in trees, there is
    nothing to see.
    """

    def __init__(
        self, run: RowPass, parts: ExitParts, k: int, rule: CascadeConfig, watch: ExitWatch
    ) -> None:
        """Watch head `k`.

        Args:
            run: Its heads say what the states mean.
            parts: What exits are made of; the draft vocabulary that of certified mode.
            k: Index of the head.
            rule: Rules by which tokens would leave.
            watch: Told of the result.
        """
        self._run = run
        self._parts = parts
        self._k = k
        self._watch = watch
        self._count = len(rule.layers)
        self._layer = rule.layers[k]
        # A weight and no decay: what other checkpoints would have added is not known.
        alone = CascadeConfig([replace(self._layer, decay=0.0)], fusion=rule.fusion)
        self._cascade = CascadeController(
            alone,
            [parts.probes.native(k)],
            gates=parts.gates.only(k),
            modules=ProbeManager([cast("LREProbe", parts.probes.probes[k])]),
        )
        self._blind = self._cascade.needs_before(0) or self._cascade.needs_attention(0)

    def see(
        self, hidden: Tensor, exits: Tensor, finals: Tensor, valid: npt.NDArray[np.bool_]
    ) -> None:
        """Take note of positions whose token has been verified.

        Args:
            hidden: States at the checkpoint, `[rows, n, width]`.
            exits: The head's states, from true feedback, same shape.
            finals: The base's own after the last layer, same shape.
            valid: Which of them are meant, `[rows, n]`.
        """
        if self._blind or not valid.any():
            return
        where = torch.from_numpy(valid)
        states = hidden[where.to(hidden.device)]
        exits, finals = exits[where.to(exits.device)], finals[where.to(finals.device)]
        state = self._cascade.start(states.shape[0])
        decision = self._decide(states, state)
        leaving = decision.try_exit
        least = self._cascade.least_probability(0, state)
        if least is not None and leaving.any():
            own = np.full(len(leaving), np.nan, np.float32)
            picked = exits[torch.from_numpy(leaving).to(exits.device)].unsqueeze(1)
            picked = picked.to(self._parts.shell.base.dtype)
            own[leaving] = top_probability(self._parts, picked)[:, 0]
            leaving = leaving & (self._cascade.sureness(0, own, state) >= least)
        self._watch.verified(self._k, decision.risk)
        rows = self._watch.pick(leaving, runs_on=False)
        if rows.any():
            self._judge(rows, exits, finals, decision.risk)

    def _judge(
        self,
        rows: npt.NDArray[np.bool_],
        exits: Tensor,
        finals: Tensor,
        risk: npt.NDArray[np.float32],
    ) -> None:
        """Compare the exits that were picked."""
        places = torch.from_numpy(rows)
        risks = np.full((int(rows.sum()), self._count), np.nan, np.float32)
        risks[:, self._k] = risk[rows]
        checkpoints = np.full(len(risks), self._k, np.int64)
        temperatures = [1.0] * self._count
        temperatures[self._k] = self._layer.temperature
        self._watch.judge(
            judged(
                exits[places.to(exits.device)].unsqueeze(1),
                finals[places.to(finals.device)].unsqueeze(1),
                self._run.logits,
                checkpoints,
                temperatures,
                risks,
                share=self._watch.share(runs_on=False),
                left=False,
            )
        )

    def _decide(self, states: Tensor, state: CascadeState) -> CheckpointDecision:
        """Risks and tries of states at the checkpoint."""
        parts = self._parts
        everyone = np.ones(states.shape[0], np.bool_)
        if states.device.type == "cpu" or self._cascade.fuses:
            return checkpoint_decision(parts, self._cascade, 0, states, state, everyone)
        return self._cascade.step_risk(0, parts.probes.risk(self._k, states), state, everyone)
