"""Certified mode with settled exits, and plain mode, over a pass inside `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sedac_hf.generation.acceptance import TokenChooser
from sedac_hf.generation.core_cycles import core_cycles, spare_looks
from sedac_hf.generation.exact_call import outcome
from sedac_hf.generation.exit_governor import ExitGovernor, is_governed
from sedac_hf.generation.prompt import read_prompt
from sedac_hf.generation.row_texts import RowTexts
from sedac_hf.generation.settle_loop import SettleLoop
from sedac_hf.generation.soft_pass_loop import SoftPassLoop

if TYPE_CHECKING:
    from sedac_hf.core.choose_pass import PassChoice
    from sedac_hf.core.session import ExitSession
    from sedac_hf.generation.exact_call import ExactCall

__all__ = ["decode_settled"]


@torch.no_grad()
def decode_settled(
    model: Any,
    session: ExitSession,
    choice: PassChoice,
    call: ExactCall,
    model_kwargs: dict[str, Any],
) -> Any:
    """Read the prompt, then let tokens leave and settle them later.

    Args:
        model: The wrapped model.
        session: The call; certified with a cascade (its exits settled, or soft), or plain.
        choice: What runs layers and heads.
        call: What transformers handed over.
        model_kwargs: What transformers carries from step to step.

    Returns:
        What `generate` returns.
    """
    parts = model.assembly.parts
    prompt = read_prompt(model, session, choice, call, model_kwargs, parts)
    state = prompt.state
    texts = RowTexts(call.input_ids, call.criteria, call.config, call.streamer, state.first)
    chooser = TokenChooser(call.own_processors, bool(call.config.do_sample), state.rows)
    governor = _governor(model, prompt.choice, session, state.rows)
    core = None
    if _may_go_all_the_way(session, governor) and not prompt.stores:
        taps = [] if session.cascade is None else [head.layer_idx + 1 for head in parts.heads]
        timed = session.meter is not None
        core = core_cycles(prompt.run, state, texts, chooser, taps=taps, timed=timed)
    spare_looks(prompt.run, texts, chooser)
    kind = SoftPassLoop if session.is_soft else SettleLoop
    loop = kind(
        prompt.run, parts, session, state, texts, chooser, prompt.last,
        max_pending=model.config.max_pending, keeps_states=prompt.stores, rests=not prompt.stores,
        core=core,
    )  # fmt: skip
    loop.decode(prompt.logits, governor)
    if governor is not None:
        model.exit_stats.governor = governor.to_dict()
    texts.end()
    session.tails += loop.tails
    if prompt.stores:
        prompt.store(loop.settle())
    return outcome(texts, call, prompt.model_kwargs)


def _may_go_all_the_way(session: ExitSession, governor: ExitGovernor | None) -> bool:
    """Whether there are steps in which nobody may leave, and of which no logits are wanted."""
    if session.cascade is None:
        return session.watch is None
    return governor is not None and not (session.is_soft or session.follows_entropy)


def _governor(
    model: Any, choice: PassChoice, session: ExitSession, rows: int
) -> ExitGovernor | None:
    """Who decides whether exits pay; nobody where online calibration must see every step."""
    if session.cascade is None or session.watch is not None or not is_governed():
        return None
    rules = session.cascade.config
    expected = None if model.certificate is None else model.certificate.cost_of(rules)
    return choice.exit_governors.find(rows, rules, expected)
