"""SedacForCausalLM: a base model, untouched, with early exits around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from sedac_hf.artefact_methods import ArtefactMethods
from sedac_hf.config import CheckpointSpec, SedacConfig
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.cache_names import CACHE_NAMES, cache_name, with_cache_as
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.core.decoder_loop import DecodeLoop
from sedac_hf.core.exit_heads import ExitHead
from sedac_hf.core.exit_parts import Assembly, build_heads, check_modules
from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.core.self_check import self_check as check_shell
from sedac_hf.core.session import ExitSession, active_session, session_scope
from sedac_hf.core.simulate import simulate
from sedac_hf.core.soft_loop import SoftLoop
from sedac_hf.core.support import check_supported, unwrap_adapter
from sedac_hf.delegation import (
    BaseDelegation,
    accepted_arguments,
    mirror_base,
    refuse_early_exit_assistant,
    untrained_base,
)
from sedac_hf.errors import ModeError
from sedac_hf.generation.exact import ExactDecoding
from sedac_hf.generation.finish import finish_generation, finish_off
from sedac_hf.generation.logits_processor import SedacLogitsProcessor

if TYPE_CHECKING:
    from sedac_hf.artefact_format import ArtefactOrigin
    from sedac_hf.calibration.certificate import Certificate
    from sedac_hf.calibration.drift import RiskHistograms
    from sedac_hf.calibration.online import OnlineCalibration
    from sedac_hf.core.channel_order import ChannelOrder

__all__ = ["SedacForCausalLM"]


class SedacForCausalLM(  # type: ignore[misc, no-untyped-call]
    ArtefactMethods, ExactDecoding, BaseDelegation, PreTrainedModel, GenerationMixin
):
    """A causal language model whose easy tokens leave early.

    Attributes:
        base_lm: The base model; its weights, configuration and modules stay as they are.
        exit_heads: One exit head per checkpoint.
        probes: One risk probe per checkpoint.
        draft_vocabulary: Token ids `[draft vocabulary]`, int64, or None for the whole vocabulary.
        cascade: The rules by which tokens leave, or None when none may.
        gates: Fusion weights and classes of tokens, which rules may use.
        certificate: The certificate, or None without one.
        refused_modes: Modes that must not be used, with the reason.
        exits_off_reason: Why exits stay off in certified mode although there are rules, or None.
        origin: The artefact that the model was loaded from, or None.
        exit_stats: Totals over all calls.
        metrics: The collector that is attached, or None.
        risk_histograms: Risks of calibration, by which online calibration sees drift, or None.
        channel_order: Order of the MLPs' channels, which soft exits need, or None.
        calibration: Online calibration, see `attach_calibration`; None without it.
    """

    config: SedacConfig
    config_class = SedacConfig
    base_model_prefix = "base_lm"
    main_input_name = "input_ids"
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012 - declared by transformers
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: SedacConfig,
        base: nn.Module | None = None,
        *,
        heads: Sequence[ExitHead] | None = None,
        probes: ProbeManager | None = None,
        draft_vocabulary: Tensor | None = None,
        gates: GateParts | None = None,
    ) -> None:
        """Put a model together; see `from_base` for the usual way.

        Args:
            config: Configuration with the base's own as `text_config`.
            base: The base model; built from `text_config`, untrained, when None.
            heads: One head per checkpoint; untrained ones when None.
            probes: One probe per checkpoint; untrained ones when None.
            draft_vocabulary: Token ids, or None for the whole vocabulary.
            gates: Fusion weights and classes of tokens; none when None.

        Raises:
            ConfigError: If the parts do not fit each other.
            UnsupportedModelError: If the base is of a kind that exits cannot work on.
        """
        built = base is None
        base = untrained_base(config) if base is None else unwrap_adapter(base)
        check_supported(base)
        mirror_base(self, base)  # before the constructor of PreTrainedModel, which looks at it
        super().__init__(config)
        self._base_is_ours = built
        # First, since dtype and device of a model are those of its first parameter.
        self.base_lm: Any = base
        self.shell = BaseShell(base)
        specs = [spec.resolved(self.shell.num_layers) for spec in config.checkpoint_specs()]
        base_config: Any = base.config
        width = int(base_config.hidden_size)
        given = build_heads(specs, self.shell) if heads is None else list(heads)
        if probes is None:
            probes = ProbeManager.build(len(specs), width, config.probe_rank)
        check_modules(specs, given, probes, width)
        self.exit_heads = nn.ModuleList(given)
        self.probes = probes
        self.register_buffer("draft_vocabulary", draft_vocabulary, persistent=False)
        self.gates = gates or GateParts()
        self.cascade: CascadeConfig | None = None
        self.calibration: OnlineCalibration | None = None
        self.risk_histograms: RiskHistograms | None = None
        self.certificate: Certificate | None = None
        self.refused_modes: dict[str, str] = {}
        self.exits_off_reason: str | None = None
        self.origin: ArtefactOrigin | None = None
        self.exit_stats = ExitStats(self.shell.num_layers, [spec.layer_idx for spec in specs])
        self.channel_order: ChannelOrder | None = None
        self._assembly: Assembly | None = None
        self._accepted = accepted_arguments(base)
        self._cache_name = cache_name(type(base).forward)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        checkpoints: Sequence[CheckpointSpec] = (),
        cascade: CascadeConfig | None = None,
        *,
        heads: Sequence[ExitHead] | None = None,
        probes: ProbeManager | None = None,
        draft_vocabulary: Tensor | None = None,
        gates: GateParts | None = None,
        self_check: bool = True,
        **config_values: Any,
    ) -> SedacForCausalLM:
        """Wrap a loaded base model.

        Args:
            base: A decoder-only causal LM of transformers, or a PEFT model around one.
            checkpoints: Where tokens may leave; none for a wrapper with exits off.
            cascade: Rules by which they leave; without them exits stay off.
            heads: Trained exit heads, one per checkpoint; untrained ones when None.
            probes: Trained probes, one per checkpoint; untrained ones when None.
            draft_vocabulary: Token ids of the draft vocabulary; None for the whole one.
            gates: Fusion weights and classes of tokens that rules may use; none when None.
            self_check: Whether to compare the wrapper with the base on four tokens first.
            **config_values: Further fields of `SedacConfig`, such as `mode` or `probe_rank`.

        Returns:
            The wrapper, in the base's training or evaluation mode.

        Raises:
            ConfigError: If checkpoints, heads, probes or rules do not fit each other or the base.
            UnsupportedModelError: If the base is of a kind that exits cannot work on.
        """
        base = unwrap_adapter(base)
        check_supported(base)
        base_config: Any = base.config
        if cascade is not None:
            strategy = config_values.setdefault("strategy", cascade.strategy)
            cascade = replace(cascade, strategy=strategy)
        values = {
            "checkpoints": [spec.to_dict() for spec in checkpoints],
            "base_model_name_or_path": base_config.name_or_path or None,
            "mode": "certified" if cascade is not None else "off",
            "dtype": cast(PreTrainedModel, base).dtype,
            "use_cache": getattr(base_config, "use_cache", True),
            **config_values,
        }
        config = SedacConfig.from_base_config(base_config, **values)
        parts: dict[str, Any] = {"heads": heads, "probes": probes}
        model = cls(config, base, draft_vocabulary=draft_vocabulary, gates=gates, **parts)
        model.train(base.training)
        model.set_cascade(cascade)
        if self_check:
            check_shell(model.shell)
        model.assembly.prepare()
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        exits: str | None = None,
        exit_start: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; exits act in decode steps, or everywhere when simulated.

        Args:
            input_ids: Token ids `[rows, seq]`.
            attention_mask: As the base takes it.
            position_ids: As the base takes it.
            past_key_values: A transformers cache.
            cache: The same under the name that transformers gives it from 5.24 on.
            inputs_embeds: Embeddings `[rows, seq, width]` in place of `input_ids`.
            labels: Targets `[rows, seq]` for a loss; then the base itself runs.
            use_cache: Whether to keep K/V.
            logits_to_keep: How many last positions get logits (0: all), or which.
            exits: None for the mode's own rule, `"off"` for the base itself, `"simulate"` to apply
                the rule of decoding at every position of a whole sequence.
            exit_start: With `"simulate"`, the first position of each row that may leave.
            **kwargs: Passed on to the base.

        Returns:
            The base's output; a `SedacOutput` when simulated.

        Raises:
            ModeError: If `exits` is unknown, or simulation has nothing to simulate.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
        }
        arguments = with_cache_as(self._cache_name, arguments)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            arguments["logits_to_keep"] = logits_to_keep
        accepted = self._accepted
        if accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        if exits == "simulate":
            return self._simulate(arguments, exit_start)
        if exits not in (None, "off"):
            raise ModeError(f"exits must be None, 'off' or 'simulate', found {exits!r}.")
        session = None if exits == "off" else active_session(self)
        if session is not None:
            return self._run(session, arguments)
        return self._forward_alone(arguments, exits)

    def _forward_alone(self, arguments: dict[str, Any], exits: str | None) -> Any:
        """A forward outside of `generate`."""
        mode = "off" if exits == "off" else self._mode(None)
        if mode == "off":
            return self.base_lm(**arguments)
        session = self._session(mode, prepare=self._cache_name not in arguments)
        output = self._run(session, arguments)
        if session.pending is not None:
            self.exit_stats.add_record(session.pending)
            if session.meter is not None:
                session.meter.alone(session.pending)
            session.tell(session.pending)
        session.end()
        return output

    def _run(self, session: ExitSession, arguments: dict[str, Any]) -> Any:
        """One forward of a call: through our loop, or the base where exits have no place."""
        if not self._takes_loop(arguments):
            session.pending = None
            return self.base_lm(**arguments)
        if session.reader is not None and session.reader.serves(arguments):
            return session.reader(arguments)
        parts = self.assembly.parts
        if session.cascade is None and not session.drafts:
            return self.shell.run(parts.passes.run_all, **arguments)
        if session.is_soft:
            return self.shell.run(SoftLoop(parts, session), **arguments)
        mask, read = arguments.get("attention_mask"), arguments.get("input_ids")
        loop = DecodeLoop(parts, session, mask, tokens=read)
        return self.shell.run(loop, **arguments)

    def _takes_loop(self, arguments: dict[str, Any]) -> bool:
        config = self.base_lm.config
        cached = arguments.get("use_cache")
        if cached is None:
            cached = getattr(config, "use_cache", True) or self._cache_name in arguments
        return bool(cached) and not (
            self.training
            or "labels" in arguments
            or arguments.get("output_attentions", config.output_attentions)
            or arguments.get("output_hidden_states", config.output_hidden_states)
        )

    def _simulate(self, arguments: dict[str, Any], exit_start: Tensor | int | None) -> Any:
        cascade = self._cascade()
        if cascade is None:
            raise ModeError(
                "exits='simulate' needs checkpoints and a cascade; this model has no exits. Fit "
                "some with sedac_hf.fit, or pass a cascade to cascade_replaced."
            )
        self.assembly.prepare()
        if cascade.is_soft:
            self.assembly.prepare_narrow()
        controller = self.assembly.controller(cascade)
        settles = self.config.kv_mode == "settle"
        return simulate(self.assembly.parts, controller, arguments, exit_start, settles=settles)

    def generate(self, *args: Any, sedac_mode: str | None = None, **kwargs: Any) -> Any:
        """Generate as the base does, with exits as the mode says.

        Args:
            *args: As for `generate` of transformers.
            sedac_mode: `"off"`, `"plain"`, `"certified"` or `"exact"`; None for the model's own.
            **kwargs: As for `generate` of transformers.

        Returns:
            What transformers returns; with `return_dict_in_generate` also `exit_layers`
            `[rows, new_tokens]`.

        Raises:
            ModeError: If the mode is unknown or refused for this model.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        refuse_early_exit_assistant(given, kwargs, self.generation_config)
        kwargs = with_cache_as(cache_name(GenerationMixin.prepare_inputs_for_generation), kwargs)
        asked, mode = sedac_mode or self.config.mode, self._mode(sedac_mode)
        if mode == "off":
            meter = self._meter("off", None)
            result = self.base_lm.generate(*args, **kwargs)
            if meter is not None:
                if asked != "off":
                    meter.event("ran_as_base")
                finish_off(result, meter, args, kwargs, self.generation_config)
            return result
        session = self._session(mode)
        if session.meter is not None and mode != asked:
            session.meter.event("without_exits")
        with session_scope(session):
            own: Any = super()
            result = own.generate(*args, **kwargs)
        finish_generation(result, session, self.exit_stats)
        return result

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        own: Any = super()
        processors = own._get_logits_processor(generation_config, *args, **kwargs)
        session = active_session(self)
        if session is not None:
            session.eos_tokens = getattr(generation_config, "_eos_token_tensor", None)
            session.keeps_rows = (generation_config.num_beams or 1) == 1
            depth, count = self.shell.num_layers, len(self.exit_heads)
            processors.insert(0, SedacLogitsProcessor(session, depth, count))
        return processors

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Verify what an assistant drafted; at full depth, whatever the length of the draft."""
        session = active_session(self)
        if session is not None:
            session.cascade = None
        own: Any = super()
        return own._assisted_decoding(*args, **kwargs)

    def init_weights(self) -> None:
        """Initialise weights only where this model built the base itself."""
        # On a base that was handed in, this would reset adapters and tie what was untied.
        if self._base_is_ours:
            own: Any = super()
            own.init_weights()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is derived from the rest and cannot be copied."""
        return {**self.__dict__, "_assembly": None, "metrics": None}
