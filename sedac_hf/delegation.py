"""What the wrapper hands through to its base, so that transformers finds it where it looks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.masking_utils import create_masks_for_generate

from sedac_hf.config import SedacConfig
from sedac_hf.core.cache_names import cache_name, with_cache_as
from sedac_hf.errors import ConfigError, ModeError

__all__ = [
    "BaseDelegation",
    "accepted_arguments",
    "mirror_base",
    "refuse_early_exit_assistant",
    "untrained_base",
]

_MIRRORED = (
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "supports_gradient_checkpointing",
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "hf_device_map",
)


class BaseDelegation:
    """Methods of `PreTrainedModel` and `GenerationMixin` that the base answers."""

    base_lm: Any
    probes: nn.Module

    @property
    def base(self) -> Any:
        """The base model."""
        return self.base_lm

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The base's own generation settings, the same object."""
        return cast("GenerationConfig | None", getattr(self.base_lm, "generation_config", None))

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        # The constructor of PreTrainedModel sets one before there is a base: the base's counts.
        modules = self.__dict__.get("_modules")
        if modules and "base_lm" in modules:
            self.base_lm.generation_config = value

    def get_input_embeddings(self) -> nn.Module:
        """The base's input embeddings."""
        return cast(nn.Module, self.base_lm.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's input embeddings."""
        self.base_lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's output layer."""
        return cast("nn.Module | None", self.base_lm.get_output_embeddings())

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the base's output layer."""
        self.base_lm.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The base's decoder."""
        return cast(nn.Module, self.base_lm.get_decoder())

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base's own preparation of a step's inputs."""
        prepare = self.base_lm.prepare_inputs_for_generation
        kwargs |= {"cache": cache, "past_key_values": past_key_values}
        return cast(
            "dict[str, Any]",
            prepare(
                input_ids,
                next_sequence_length=next_sequence_length,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **with_cache_as(cache_name(prepare), kwargs),
            ),
        )

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own masks where it has its own way of making them."""
        own = getattr(self.base_lm, "create_masks_for_generate", create_masks_for_generate)
        return own(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        # A loop that leaves early is no single graph.
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast everything; probes follow to the device but stay float32."""
        kept = {
            name: value.detach().clone()
            for name, value in self.probes.named_parameters()
            if not value.is_meta
        }
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for name, value in self.probes.named_parameters():
            if name in kept and not value.is_meta and value.dtype != kept[name].dtype:
                value.data = kept[name].to(value.device)
        return result


def accepted_arguments(base: nn.Module) -> frozenset[str] | None:
    """Names that the base's forward takes; None if it takes any.

    Args:
        base: The base model.
    """
    parameters = inspect.signature(base.forward).parameters
    return None if "kwargs" in parameters else frozenset(parameters)


def refuse_early_exit_assistant(
    config: GenerationConfig | None, arguments: dict[str, Any], default: GenerationConfig | None
) -> None:
    """Refuse transformers' own early-exit drafting, which can leave the base damaged.

    Args:
        config: The generation settings of the call, if given.
        arguments: Keyword arguments of the call.
        default: The model's own settings.

    Raises:
        ModeError: If `assistant_early_exit` is set anywhere.
    """
    value = arguments.get("assistant_early_exit")
    if value is None:
        settings = config if config is not None else default
        value = getattr(settings, "assistant_early_exit", None)
    if value is not None:
        raise ModeError(
            f"assistant_early_exit={value!r} lowers the number of layers in the base's live "
            "configuration and leaves it so after an error. Use sedac_mode='exact' to draft with "
            "exits, or call model.base.generate yourself."
        )


def mirror_base(model: nn.Module, base: nn.Module) -> None:
    """Give the wrapper those attributes by which transformers tells what a model can do.

    Args:
        model: The wrapper.
        base: The base model.
    """
    for name in _MIRRORED:
        if hasattr(base, name):
            object.__setattr__(model, name, getattr(base, name))


def untrained_base(config: SedacConfig) -> nn.Module:
    """A base from the configuration alone.

    Args:
        config: A configuration with the base's own as `text_config`.

    Raises:
        ConfigError: If it has none.
    """
    if config.text_config is None:
        raise ConfigError(
            "This SedacConfig names no base architecture (text_config is missing). Build it with "
            "SedacConfig.from_base_config, or load an artefact with from_pretrained."
        )
    auto: Any = AutoModelForCausalLM
    return cast(nn.Module, auto.from_config(config.text_config))
