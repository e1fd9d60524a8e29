"""SedacConfig: what an artefact says about itself, beside the base's own configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from sedac_hf.core.exit_strategy import strategy_name
from sedac_hf.errors import ConfigError
from sedac_hf.registration import register_model

__all__ = ["HEADS", "KV_MODES", "MODES", "PROBE_TARGETS", "CheckpointSpec", "SedacConfig"]

MODES = ("off", "plain", "certified", "exact")
PROBE_TARGETS = ("entropy", "divergence")
HEADS = ("lens", "block")
KV_MODES = ("propagate", "settle")
_STORAGES = ("whole", "delta")


@dataclass(frozen=True)
class CheckpointSpec:
    """One checkpoint and the exit head that hangs on it.

    Attributes:
        layer_idx: 0-based index of the layer whose output is inspected; -1 is the embedding.
        head: `"lens"` (low-rank residual affine map) or `"block"` (trained decoder layers).
        num_layers: Decoder layers in a block head, 1 or 2.
        feedback: Whether a block head is also given the previous position's final state.
        storage: `"whole"`, or `"delta"` for a low-rank difference to base layers.
        delta_rank: Rank of the difference, 0 unless `storage` is `"delta"`.
        lens_rank: Rank of a lens head.
        template_layer: Base layer whose type, mask and rotary embedding a block copies; -1 is
            the last.
    """

    layer_idx: int
    head: str = "block"
    num_layers: int = 1
    feedback: bool = False
    storage: str = "whole"
    delta_rank: int = 0
    lens_rank: int = 64
    template_layer: int = -1

    def __post_init__(self) -> None:
        """Refuse values that no head can be built from.

        Raises:
            ConfigError: If a field is out of range or two fields contradict each other.
        """
        where = f"checkpoint after layer {self.layer_idx!r}"
        for name in ("layer_idx", "num_layers", "delta_rank", "lens_rank", "template_layer"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{where}: {name} must be an int, found {value!r}.")
        if self.layer_idx < -1:
            raise ConfigError(f"{where}: layer_idx must be -1 (the embedding) or more.")
        if self.head not in HEADS:
            raise ConfigError(f"{where}: head must be one of {HEADS}, found {self.head!r}.")
        if self.storage not in _STORAGES:
            raise ConfigError(
                f"{where}: storage must be one of {_STORAGES}, found {self.storage!r}."
            )
        if not 1 <= self.num_layers <= 2:
            raise ConfigError(f"{where}: num_layers must be 1 or 2, found {self.num_layers}.")
        if self.template_layer < -1:
            raise ConfigError(f"{where}: template_layer must be -1 (the last) or more.")
        if self.head == "lens" and (self.feedback or self.storage == "delta"):
            raise ConfigError(f"{where}: feedback and delta storage belong to block heads only.")
        if self.head == "lens" and self.lens_rank < 1:
            raise ConfigError(f"{where}: lens_rank must be at least 1, found {self.lens_rank}.")
        if (self.storage == "delta") != (self.delta_rank > 0):
            raise ConfigError(
                f"{where}: delta_rank must be positive with storage 'delta' and 0 otherwise, "
                f"found storage {self.storage!r} with delta_rank {self.delta_rank}."
            )

    def resolved(self, num_layers: int) -> CheckpointSpec:
        """This checkpoint on a base of `num_layers` layers, -1 in `template_layer` filled in.

        Args:
            num_layers: Decoder layers of the base.

        Returns:
            The same checkpoint with an explicit template layer.

        Raises:
            ConfigError: If the checkpoint or the template lies beyond the depth of the base.
        """
        if self.layer_idx > num_layers - 2:
            raise ConfigError(
                f"A checkpoint after layer {self.layer_idx} leaves nothing to skip: the base has "
                f"{num_layers} layers, so layer_idx may be at most {num_layers - 2}."
            )
        if self.template_layer >= num_layers:
            raise ConfigError(
                f"template_layer {self.template_layer} does not exist: the base has layers 0 to "
                f"{num_layers - 1}."
            )
        if self.template_layer == -1:
            return replace(self, template_layer=num_layers - 1)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointSpec:
        """Read a checkpoint as `to_dict` wrote it.

        Args:
            values: Field names and values.

        Returns:
            The checkpoint.

        Raises:
            ConfigError: If a field is unknown or missing, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"A checkpoint has unknown fields {unknown}; known are {sorted(known)}. The "
                "artefact may have been written by a newer sedac_hf: upgrade it."
            )
        if "layer_idx" not in values:
            raise ConfigError("A checkpoint has no layer_idx: say after which layer it stands.")
        return cls(**values)


@strict
class SedacConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a base model with early exits.

    Args:
        text_config: The base's own configuration; the same object that the base holds.
        base_model_name_or_path: Where the base comes from.
        base_model_revision: Commit of the base the artefact was fitted on.
        fingerprint: Shape and weight digests of the base.
        checkpoints: `CheckpointSpec.to_dict()` of each checkpoint, by increasing layer.
        probe_rank: Rank of the risk probes.
        probe_target: What the probes were trained to say, `"entropy"` or `"divergence"`.
        mode: Mode used when none is asked for.
        strategy: What an exit skips; `"hard"` skips the tail, `"soft"` and `"adaptive-soft"` the
            less important channels of its MLPs.
        kv_mode: How the tail's K/V of an exited token come about: `"propagate"` from its frozen
            state at once, `"settle"` by running the tail later, which gives the base's own. Soft
            exits run the tail themselves, so it does not concern them.
        max_pending: Exited tokens that may wait for their tails where exits are settled.
        head_hits: For each checkpoint, the share of held-out tokens on which the base's choice was
            among the head's first 1, 2, 4 and 8; what drafting begins to reckon with.
        certified_dtypes: Data types the certificate was obtained in, such as `"bfloat16"`.
        use_cache: Whether decoding keeps K/V.
    """

    model_type = "sedac"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        # Optional: a default would silently build a full-size Llama where the base is missing.
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True)
    }

    text_config: dict | PreTrainedConfig | None = None  # type: ignore[type-arg]
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    fingerprint: dict | None = None  # type: ignore[type-arg]
    checkpoints: list[dict] | None = None  # type: ignore[type-arg]
    probe_rank: int = 64
    probe_target: str = "entropy"
    mode: str = "certified"
    strategy: str = "hard"
    kv_mode: str = "propagate"
    max_pending: int = 8
    head_hits: list[list[float]] | None = None
    certified_dtypes: list[str] | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields and make the Auto classes know the model.

        Args:
            **kwargs: Further fields of `PreTrainedConfig`.

        Raises:
            ConfigError: If a field has a value that is not among those allowed.
        """
        if isinstance(self.text_config, PreTrainedConfig):
            _keep_implementations(self.text_config, kwargs)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        register_model()
        self.checkpoints = self.checkpoints or []
        self.certified_dtypes = self.certified_dtypes or []
        _check_choice("mode", self.mode, MODES)
        _check_choice("probe_target", self.probe_target, PROBE_TARGETS)
        self.strategy = strategy_name(self.strategy)
        _check_choice("kv_mode", self.kv_mode, KV_MODES)
        if self.probe_rank < 1:
            raise ConfigError(f"probe_rank must be at least 1, found {self.probe_rank}.")
        if self.max_pending < 1:
            raise ConfigError(f"max_pending must be at least 1, found {self.max_pending}.")
        specs = self.checkpoint_specs()
        _check_hits(self.head_hits, len(specs))
        layers = [spec.layer_idx for spec in specs]
        if layers != sorted(set(layers)):
            raise ConfigError(
                "Checkpoints must stand after different layers, in increasing order; found "
                f"{layers}."
            )

    def checkpoint_specs(self) -> list[CheckpointSpec]:
        """The checkpoints as objects, checked."""
        return [CheckpointSpec.from_dict(values) for values in self.checkpoints or []]

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """The base's own configuration, or this one while no base is known."""
        del decoder, encoder
        return self.text_config if isinstance(self.text_config, PreTrainedConfig) else self

    @classmethod
    def from_base_config(cls, base_config: PreTrainedConfig, **values: Any) -> SedacConfig:
        """Build the configuration around a base's live one without touching it.

        Args:
            base_config: `config` of the base; it becomes `text_config`, the same object.
            **values: Further fields.

        Returns:
            The configuration.
        """
        return cls(text_config=base_config, **values)


def _keep_implementations(live: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Hand a live configuration its own attention and experts implementations back.

    A composite config pushes its own None into sub-configs. On the configuration of a live model
    that would switch the masks off, and attention would no longer be causal.
    """
    attention = getattr(live, "_attn_implementation", None)
    experts = getattr(live, "_experts_implementation", None)
    if kwargs.get("attn_implementation") is None:
        kwargs["attn_implementation"] = {"": attention, "text_config": attention}
    if kwargs.get("experts_implementation") is None:
        # At the top it must stay None: the wrapper itself has no experts.
        kwargs["experts_implementation"] = {"": None, "text_config": experts}


def _check_hits(hits: list[list[float]] | None, checkpoints: int) -> None:
    if hits is None:
        return
    rows = [len(row) == 4 and all(0 <= rate <= 1 for rate in row) for row in hits]
    if len(rows) != checkpoints or not all(rows):
        raise ConfigError(
            f"head_hits must hold four rates between 0 and 1 for each of {checkpoints} "
            f"checkpoints, found {hits}."
        )


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {allowed}, found {value!r}.")


AutoConfig.register("sedac", SedacConfig, exist_ok=True)
