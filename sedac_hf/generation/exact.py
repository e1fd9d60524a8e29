"""Exact mode inside `generate`: exits and the text itself draft, the full depth verifies."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sedac_hf.core.choose_pass import PassChoice
from sedac_hf.core.draft_stats import DraftStats
from sedac_hf.core.session import ExitSession, active_session
from sedac_hf.generation.acceptance import TokenChooser
from sedac_hf.generation.core_cycles import core_cycles, spare_looks
from sedac_hf.generation.exact_call import ExactCall, outcome, why_not
from sedac_hf.generation.exact_loop import ExactLoop
from sedac_hf.generation.head_draft import HeadDraft
from sedac_hf.generation.head_watch import HeadWatch
from sedac_hf.generation.prompt import read_prompt
from sedac_hf.generation.row_texts import RowTexts
from sedac_hf.generation.settled import decode_settled
from sedac_hf.modes import ModeControl

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from sedac_hf.core.row_pass import RowPass

__all__ = ["ExactDecoding"]


class ExactDecoding(ModeControl):
    """The part of the model that decodes in exact mode."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling; as transformers does it where exact mode cannot serve."""
        own: Any = super()
        session = active_session(self)
        if session is not None and session.meter is not None:
            # One token per row and step, or whole paths: both can be told as they come.
            session.meter.live = True
        if session is not None and session.on_pass:
            call = ExactCall(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer
            )
            choice = self.pass_choice()
            stats = self.exit_stats
            stats.runs_on, stats.runs_on_reason = choice.name, choice.reason
            reason: str | None = choice.reason
            if choice.build is not None:
                reason = "rows wait for other processes" if synced_gpus else None
                reason = reason or why_not(call, model_kwargs)
            if reason is None and session.mode == "exact":
                return self._decode_exactly(session, choice, call, model_kwargs)
            # Where no tail waits for others there is nothing to gain but the native pass.
            waits = session.mode != "plain" and not session.is_soft
            gains = waits or choice.name == "native"
            if reason is None and gains and choice.build is not None:
                return decode_settled(self, session, choice, call, model_kwargs)
            if reason is not None and choice.build is not None:
                stats.runs_on, stats.runs_on_reason = "modules", reason
            if session.mode == "exact":
                session.drafted = DraftStats()
                session.drafted.reason = reason or ""
        return own._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def pass_choice(self) -> PassChoice:
        """The pass that serves this model, found out once."""
        choices = self.assembly.choices
        if self._native_is_disabled():
            return choices.modules("the native pass is disabled")
        return choices.best()

    @torch.no_grad()
    def _decode_exactly(
        self,
        session: ExitSession,
        choice: PassChoice,
        call: ExactCall,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """Read the prompt, then run cycles of drafting and verifying."""
        session.drafts = bool(len(self.exit_heads))
        parts = self.assembly.parts
        parts = replace(parts, draft=parts.draft.extended(call.input_ids))
        layers = [each.spec.layer_idx for each in parts.heads]
        hits = self.config.head_hits
        k = choice.governors.pick_head(len(call.input_ids), layers, hits)
        prompt = read_prompt(self, session, choice, call, model_kwargs, parts, only=k)
        run, state, last = prompt.run, prompt.state, prompt.last
        texts = RowTexts(
            call.input_ids, call.criteria, call.config, call.streamer, state.first, session.origins
        )
        sample = bool(call.config.do_sample)
        chooser = TokenChooser(call.own_processors, sample, state.rows)
        head = None
        governors = prompt.choice.governors
        if prompt.choice is not choice:
            k = governors.pick_head(state.rows, layers, hits)
        if k is not None and session.in_step:
            watch = self._head_watch(session, run, k)
            head = HeadDraft(
                run, k, parts.heads[k].spec, state, parts.draft.tokens, last, watch,
                hits[k] if hits else None,
            )  # fmt: skip
        depth = self.shell.num_layers
        starts = [layer + 1 for layer in layers]
        governor = governors.find(run, starts, depth, state, head)
        keeps = prompt.stores and session.in_step
        # Who watches exits must see their states, and who gets the cache back all K/V.
        steps = prompt.stores or session.watch is not None
        timed = session.meter is not None
        core = None if steps else core_cycles(run, state, texts, chooser, head, timed=timed)
        spare_looks(run, texts, chooser)
        loop = ExactLoop(
            run, depth, state, texts, chooser, head, governor,
            keeps_states=keeps, rests=not prompt.stores, meter=session.meter, core=core,
        )  # fmt: skip
        loop.begin(prompt.logits)
        loop.decode()
        texts.end()
        session.drafted = loop.stats
        session.drafted.chains_reason = "" if run.holds_trees else prompt.choice.reason
        session.drafted.choices = governors.to_dict()
        if prompt.stores:
            specs = [each.spec for each in parts.heads]
            prompt.store(loop.catch_up(specs, last) if keeps else last[:, :0])
        return outcome(texts, call, prompt.model_kwargs)

    def _head_watch(self, session: ExitSession, run: RowPass, k: int) -> HeadWatch | None:
        """Holds the drafting head's exits against verified tokens, where somebody wants to know."""
        if session.watch is None:
            return None
        rule = session.watch.cascade.config
        return HeadWatch(run, self.assembly.parts, k, rule, session.watch)
