"""How a call begins over a pass, and what it leaves behind: the prompt in, the cache out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.core.cache_names import cache_in
from sedac_hf.core.choose_pass import CallPass
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.prompt_reader import PromptReader
from sedac_hf.generation.exact_call import padding_of, rows_behind

if TYPE_CHECKING:
    from sedac_hf.core.choose_pass import PassChoice
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.core.session import ExitSession
    from sedac_hf.generation.exact_call import ExactCall
    from sedac_hf.generation.row_state import RowState

__all__ = ["Prompt", "read_prompt"]


@dataclass
class Prompt:
    """A prompt that a pass has taken in.

    Attributes:
        run: Runs layers and heads.
        choice: What it is.
        parts: What exits are made of.
        session: The call.
        state: Where the rows stand.
        logits: The base's logits behind the prompt, `[rows, vocabulary]`, float32.
        last: Final-layer state of the prompt's end, `[rows, 1, width]`; zeros if nobody asks.
        model_kwargs: What transformers carries from step to step, the next step prepared.
        stores: Whether somebody looks at the cache after the call.
        unsaved: Final-layer states of the prompt that the cache lacks.
    """

    run: RowPass
    choice: PassChoice
    parts: ExitParts
    session: ExitSession
    state: RowState
    logits: Tensor
    last: Tensor
    model_kwargs: dict[str, Any]
    stores: bool
    unsaved: list[Tensor] = field(default_factory=list)

    def store(self, states: Tensor) -> None:
        """Append everything since the call began to the cache, heads' part if they have followed.

        Args:
            states: Final-layer states of what was settled since the prompt, `[rows, most, width]`.
        """
        cache, follow = cache_in(self.model_kwargs), self.session.in_step
        if follow and self.parts.layout.has_feedback:
            whole = torch.cat([*self.unsaved, states.to(self.last.dtype)], dim=1)
            if whole.shape[1]:
                self.parts.layout.push_states(cache, whole.to(self.parts.shell.base.dtype))
        self.run.store(cache, self.state.length, heads=follow)


def read_prompt(
    model: Any,
    session: ExitSession,
    choice: PassChoice,
    call: ExactCall,
    model_kwargs: dict[str, Any],
    parts: ExitParts,
    only: int | None = None,
) -> Prompt:
    """Read the prompt: through the native pass, or by the base's forward where that serves.

    Args:
        model: The wrapped model.
        session: The call.
        choice: What shall run layers and heads; the base's modules do where it does not serve.
        call: What transformers handed over.
        model_kwargs: What transformers carries from step to step.
        parts: What exits are made of, as they are for the call.
        only: The head that will be asked; the others are spared the prompt where nobody looks at
            the cache afterwards. None for all.

    Returns:
        The prompt.

    Raises:
        CacheError: If nothing can read the cache.
    """
    session.prompt_length = call.input_ids.shape[1]
    cache = cache_in(model_kwargs)
    returned = bool(call.config.return_dict_in_generate)
    stores = returned or bool(getattr(cache, "_is_user_defined", False))
    rows, first = len(call.input_ids), padding_of(model_kwargs)

    def reader_over(run: RowPass) -> PromptReader | None:
        if not isinstance(run, NativePass):
            return None
        return PromptReader(
            run, parts, session, cache, rows, first,
            only=None if stores else only, keeps_states=stores,
        )  # fmt: skip

    serving = CallPass(model.assembly.choices, choice, parts)
    run, reader = serving.begin(reader_over)
    session.reader = reader
    try:
        outputs = model._prefill(call.input_ids, call.config, model_kwargs)
    finally:
        session.reader = None
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    logits: Tensor = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    del outputs
    if reader is not None and reader.has_read:
        length, last, unsaved = reader.lengths, reader.last, reader.states
    else:
        run, length = serving.begin(lambda run: run.load(cache))
        last, unsaved = _last_state(parts, session, cache, len(length)), []
    state = rows_behind(model_kwargs, length)
    stats = model.exit_stats
    stats.runs_on, stats.runs_on_reason = serving.choice.name, serving.choice.reason
    return Prompt(
        run, serving.choice, parts, session, state, logits, last, model_kwargs, stores, unsaved
    )


def _last_state(parts: ExitParts, session: ExitSession, cache: Any, rows: int) -> Tensor:
    """Final-layer state of the prompt's end, `[rows, 1, width]`; zeros if it is not kept."""
    shell = parts.shell
    width = int(shell.base.config.hidden_size)
    like = torch.zeros((rows, 1, width), dtype=shell.base.dtype, device=shell.input_device)
    if not parts.layout.has_feedback or not session.in_step:
        return like
    return parts.layout.last_state(cache, like)
