"""What a policy costs, in fractions of one full pass over the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sedac_hf.core.base_shell import BaseShell
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from sedac_hf.config import CheckpointSpec

__all__ = ["CheckpointCost", "CostModel"]

FloatArray = npt.NDArray[np.float64]

# Modules whose product gives K or V. Fused ones run whole: the cache is only written after them.
_KEY_VALUE = frozenset({"k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
_FUSED = frozenset({"qkv_proj", "query_key_value", "c_attn", "Wqkv", "att_proj"})
# Share of a layer assumed where neither kind is found.
_UNKNOWN_KEY_VALUE_SHARE = 0.25
_EXPERT = re.compile(r"(^|\.)experts(\.|$)")


@dataclass(frozen=True)
class CheckpointCost:
    """Costs at one checkpoint, each a fraction of a full pass for one token.

    Attributes:
        layer_idx: Layer whose output is inspected; -1 is the embedding.
        probe: The risk probe.
        fill: K/V of the exit head where it is not run.
        attempt: The exit head itself, its own K/V included.
        gate: The draft vocabulary's head, paid by a try where a least probability is asked for.
        saved: The layers after the checkpoint, less their K/V projections.
    """

    layer_idx: int
    probe: float
    fill: float
    attempt: float
    gate: float
    saved: float

    def __post_init__(self) -> None:
        """Refuse costs that are negative or not finite.

        Raises:
            CalibrationError: If a cost is out of range.
        """
        for name in ("probe", "fill", "attempt", "gate", "saved"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise CalibrationError(
                    f"{name} at the checkpoint after layer {self.layer_idx} must be a finite "
                    f"fraction of a full pass, at least 0; found {value!r}."
                )


@dataclass(frozen=True)
class CostModel:
    """Costs of all checkpoints of an artefact on one base. A full pass, head included, costs 1.

    Attributes:
        checkpoints: Costs by checkpoint, in the order of the layers.
        head: The vocabulary head's share of a full pass.
        depth: Decoder layers of the base.
        source: `"parameters"` (bytes that a token reads) or `"measured"` (seconds).
    """

    checkpoints: tuple[CheckpointCost, ...]
    head: float
    depth: int
    source: str = "parameters"

    def expected(
        self,
        exits: npt.ArrayLike,
        tries: npt.ArrayLike,
        gated: npt.ArrayLike,
        tokens: int,
    ) -> FloatArray:
        """Mean cost of a decode step under each of P policies.

        Args:
            exits: Tokens that left at each checkpoint, shape `[P, K]`.
            tries: Tokens for which the exit head was run, shape `[P, K]`.
            gated: Whether the policy asks for a least probability there, shape `[P, K]`.
            tokens: Decode steps that were counted.

        Returns:
            Costs, shape `[P]`; below 1 means cheaper than a plain pass.
        """
        left = np.atleast_2d(np.asarray(exits, dtype=np.float64))
        tried = np.atleast_2d(np.asarray(tries, dtype=np.float64))
        if left.shape != tried.shape or left.shape[1] != len(self.checkpoints):
            raise CalibrationError(
                f"exits and tries must have shape [policies, {len(self.checkpoints)}], found "
                f"{left.shape} and {tried.shape}."
            )
        if tokens < 1:
            return np.ones(left.shape[0])
        seen = tokens - np.cumsum(left, axis=1) + left
        column = {
            field.name: np.array([getattr(c, field.name) for c in self.checkpoints])
            for field in fields(CheckpointCost)
        }
        attempt = column["attempt"] + column["gate"] * np.atleast_2d(np.asarray(gated, dtype=bool))
        # Where a head is not run its K/V are filled all the same, after an earlier exit too.
        extra = (
            seen * column["probe"]
            + tried * attempt
            + (tokens - tried) * column["fill"]
            - left * column["saved"]
        )
        cost: FloatArray = 1.0 + extra.sum(axis=1) / tokens
        return cost

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel,
        checkpoints: Sequence[CheckpointSpec],
        *,
        probe_rank: int,
        draft_vocabulary: int = 0,
    ) -> CostModel:
        """Costs as bytes of weights that one token reads, which is what decoding is bound by.

        Of a mixture of experts only the chosen experts count.

        Args:
            base: The base model.
            checkpoints: Checkpoints and their heads, by increasing layer.
            probe_rank: Rank of the risk probes.
            draft_vocabulary: Words of the exits' own head; 0 when the exits use the base's head.

        Returns:
            The cost model.
        """
        config = base.config.get_text_config()
        experts = _expert_share(config)
        layers = list(BaseShell(base).layers)
        layer = np.array([_read_bytes(module, experts) for module in layers])
        key_value = np.array(
            [_key_value_bytes(m, size) for m, size in zip(layers, layer, strict=True)]
        )
        vocabulary: nn.Module | None = base.get_output_embeddings()  # type: ignore[no-untyped-call]
        if vocabulary is None:
            raise CalibrationError("the base has no output embeddings, so a pass has no cost.")
        head = _read_bytes(vocabulary, 1.0)
        width, rows = int(config.hidden_size), int(config.vocab_size)
        item = head / max(1, width * rows)
        total = float(layer.sum() + head)
        gate = min(1.0, (draft_vocabulary or rows) / rows) * head
        costs = []
        for spec in checkpoints:
            after = slice(spec.layer_idx + 1, None)
            template = spec.template_layer
            if spec.head == "lens":
                attempt, fill = 2.0 * width * spec.lens_rank * item, 0.0
            else:
                mixing = 2.0 * width * width * item if spec.feedback else 0.0
                attempt = spec.num_layers * layer[template] + mixing
                fill = (spec.num_layers - 1) * layer[template] + key_value[template] + mixing
            costs.append(
                CheckpointCost(
                    layer_idx=spec.layer_idx,
                    # Probes are float32 whatever the base is.
                    probe=float(4.0 * probe_rank * width / total),
                    fill=float(fill / total),
                    attempt=float(attempt / total),
                    gate=float(gate / total),
                    saved=float((layer[after] - key_value[after]).sum() / total),
                )
            )
        return cls(tuple(costs), head=head / total, depth=len(layers))

    @classmethod
    def from_seconds(
        cls,
        checkpoints: Sequence[CheckpointCost],
        *,
        head: float,
        full_pass: float,
        depth: int,
    ) -> CostModel:
        """Costs from times measured on a machine.

        Args:
            checkpoints: Costs in seconds.
            head: Seconds of the vocabulary head.
            full_pass: Seconds of a full pass, head included.
            depth: Decoder layers of the base.

        Returns:
            The cost model, in fractions of a full pass.

        Raises:
            CalibrationError: If `full_pass` is not a positive number.
        """
        if not 0.0 < full_pass < float("inf"):
            raise CalibrationError(f"full_pass must be positive seconds, found {full_pass!r}.")
        names = ("probe", "fill", "attempt", "gate", "saved")
        scaled = tuple(
            CheckpointCost(c.layer_idx, **{n: getattr(c, n) / full_pass for n in names})
            for c in checkpoints
        )
        return cls(scaled, head=head / full_pass, depth=depth, source="measured")

    def to_dict(self) -> dict[str, Any]:
        """The costs as plain JSON values."""
        return {**asdict(self), "checkpoints": [asdict(c) for c in self.checkpoints]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostModel:
        """Inverse of `to_dict`.

        Args:
            values: What `to_dict` gave.

        Returns:
            The cost model.
        """
        rest = {**values, "checkpoints": tuple(CheckpointCost(**c) for c in values["checkpoints"])}
        return cls(**rest)


def _expert_share(config: Any) -> float:
    """Share of the experts that one token visits, 1 in a dense model."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    return min(1.0, chosen / count) if chosen and count else 1.0


def _read_bytes(module: nn.Module, experts: float) -> float:
    return float(
        sum(
            p.numel() * p.element_size() * (experts if _EXPERT.search(name) else 1.0)
            for name, p in module.named_parameters()
        )
    )


def _key_value_bytes(layer: nn.Module, size: float) -> float:
    for names in (_KEY_VALUE, _FUSED):
        found = [m for name, m in layer.named_modules() if name.rpartition(".")[2] in names]
        if found:
            return sum(_read_bytes(module, 1.0) for module in found)
    return _UNKNOWN_KEY_VALUE_SHARE * size
