"""Certified mode with settled exits, and plain mode, over a pass inside `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.core.cache_names import cache_in
from sedac_hf.generation.acceptance import TokenChooser
from sedac_hf.generation.exact_call import outcome, rows_behind
from sedac_hf.generation.row_texts import RowTexts
from sedac_hf.generation.settle_loop import SettleLoop

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
    """Read the prompt by the ordinary forward, then let tokens leave and settle them later.

    Args:
        model: The wrapped model.
        session: The call; certified with a cascade, or plain.
        choice: What runs layers and heads.
        call: What transformers handed over.
        model_kwargs: What transformers carries from step to step.

    Returns:
        What `generate` returns.
    """
    session.prompt_length = call.input_ids.shape[1]
    outputs = model._prefill(call.input_ids, call.config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    logits: Tensor = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs
    cache = cache_in(model_kwargs)
    parts = model.assembly.parts
    run, length = choice.begin(parts, cache)
    state = rows_behind(model_kwargs, length)
    texts = RowTexts(call.input_ids, call.criteria, call.config, call.streamer, state.first)
    chooser = TokenChooser(call.own_processors, bool(call.config.do_sample), state.rows)
    last = model._last_state(cache, state.rows)
    returned = bool(call.config.return_dict_in_generate)
    stores = returned or bool(getattr(cache, "_is_user_defined", False))
    loop = SettleLoop(
        run, parts, session, state, texts, chooser, last,
        max_pending=model.config.max_pending, keeps_states=stores,
    )  # fmt: skip
    loop.decode(logits)
    texts.end()
    session.tails += loop.tails
    if stores:
        states = loop.settle()
        if parts.layout.has_feedback and states.shape[1]:
            parts.layout.push_states(cache, states)
        run.store(cache, state.length)
    return outcome(texts, call, model_kwargs)
