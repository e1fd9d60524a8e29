"""Which base an artefact belongs to: the shape of its text config and hashes of some weights.

The hashes are taken over values rounded to bfloat16, with the small ones flushed to zero, so that
the same weights give the same fingerprint whether loaded as bfloat16, float16 or float32.
Quantised projections cannot be compared value by value: then only norms and head are hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sedac_hf.core.support import find_decoder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

FINGERPRINT_VERSION = 1

# Fields of a text config that decide the shape of its weights and hidden states.
SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)

# Below this float16 is subnormal and drops bits that bfloat16 keeps.
_FLUSH_BELOW = 2.0**-13
_HEAD_ROWS = 256
_LAYER_ROWS = 16


@dataclass(frozen=True)
class FingerprintMatch:
    """How a loaded base compares with the fingerprint in an artefact.

    Attributes:
        shape_differences: Field of the text config -> (expected, found).
        weight_differences: Parts ("norms", "head", "layers") whose hashes differ.
        not_compared: Parts that one of the two sides could not hash (quantised, absent).
    """

    shape_differences: dict[str, tuple[Any, Any]]
    weight_differences: tuple[str, ...]
    not_compared: tuple[str, ...]

    @property
    def same_shape(self) -> bool:
        """Whether probes and exit heads fit the base at all."""
        return not self.shape_differences

    @property
    def same_weights(self) -> bool:
        """Whether every part that both sides could hash is equal, and at least one was compared."""
        return self.same_shape and not self.weight_differences and "norms" not in self.not_compared


def fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """Take the fingerprint of a base model.

    Reads a few rows of a few weights, wherever they are: on a CPU, on an accelerator or offloaded.

    Args:
        base: A causal language model, possibly dispatched, quantised or with adapters.

    Returns:
        A dict for JSON: `version`, `shape` (field -> value) and `weights` (part -> SHA-256 or None
        where the part cannot be read as plain floating-point numbers).

    Raises:
        UnsupportedModelError: If the model has no list of decoder layers.
    """
    decoder, layers_name = find_decoder(base)
    layers = getattr(decoder, layers_name)
    return {
        "version": FINGERPRINT_VERSION,
        "shape": shape_of(_text_config(base)),
        "weights": {
            "norms": _hash_norms(decoder, layers),
            "head": _hash_head(base),
            "layers": None if is_quantised(base) else _hash_layers(layers),
        },
    }


def shape_of(text_config: Any) -> dict[str, Any]:
    """Collect the fields of a text config that decide shapes; fields it lacks are left out."""
    values = {name: getattr(text_config, name, None) for name in SHAPE_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def compare(expected: dict[str, Any], found: dict[str, Any]) -> FingerprintMatch:
    """Compare the fingerprint stored in an artefact with that of a loaded base."""
    want, have = expected.get("shape", {}), found.get("shape", {})
    shape = {
        name: (want.get(name), have.get(name))
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    }
    want, have = expected.get("weights", {}), found.get("weights", {})
    parts = sorted(want.keys() | have.keys())
    missing = tuple(p for p in parts if want.get(p) is None or have.get(p) is None)
    differing = tuple(p for p in parts if p not in missing and want[p] != have[p])
    return FingerprintMatch(shape, differing, missing)


def is_quantised(base: PreTrainedModel) -> bool:
    """Whether transformers loaded the base through a quantiser."""
    return bool(getattr(base, "is_quantized", False)) or (
        getattr(base, "hf_quantizer", None) is not None
    )


def dtype_name(base: PreTrainedModel) -> str:
    """Name of a base's data type, such as "bfloat16"."""
    return str(base.dtype).removeprefix("torch.")


def dtype_label(model: PreTrainedModel) -> str:
    """Name what a base or its wrapper computes in: "bfloat16", or "bfloat16/gptq" if quantised."""
    name = dtype_name(model)
    if not is_quantised(model):
        return name
    settings = getattr(model.config, "quantization_config", None)
    method = getattr(model, "quantization_method", None) or (
        settings.get("quant_method") if isinstance(settings, dict) else None
    )
    return f"{name}/{getattr(method, 'value', method) or 'quantised'}"


def _text_config(base: PreTrainedModel) -> Any:
    return base.config.get_text_config(decoder=True)


def _hash_norms(decoder: nn.Module, layers: nn.ModuleList) -> str | None:
    """Hash all vectors outside the layers (the final norm) and those of three layers."""
    inside = {id(module) for module in layers.modules()}
    vectors = [value for ndim, value in _parameters(decoder, skip=inside) if ndim == 1]
    for layer in _three(layers):
        vectors += [value for ndim, value in _parameters(layer) if ndim == 1]
    return _hash(vectors)


def _hash_head(base: PreTrainedModel) -> str | None:
    """Hash evenly spaced rows of the output matrix."""
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    # The tied head of an offloaded base may have no weight of its own: the embedding then speaks.
    for module in (head, base.get_input_embeddings()):
        for ndim, value in _parameters(module):
            if ndim == 2 and value is not None:
                return _hash([_rows(value, _HEAD_ROWS)])
    return None


def _hash_layers(layers: nn.ModuleList) -> str | None:
    """Hash a few rows of every matrix of three layers; None when one of them is not plain."""
    matrices = [value for layer in _three(layers) for ndim, value in _parameters(layer) if ndim > 1]
    return _hash([None if m is None else _rows(m.flatten(0, -2), _LAYER_ROWS) for m in matrices])


def _three(layers: nn.ModuleList) -> list[nn.Module]:
    return [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]


def _parameters(
    module: nn.Module | None, skip: set[int] | None = None
) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Yield (dimensions, values) in the order of the names; no values where not readable."""
    if module is None:
        return
    for _, child in sorted(module.named_modules(), key=lambda item: item[0]):
        if skip and id(child) in skip:
            continue
        for name, parameter in sorted(child.named_parameters(recurse=False)):
            yield parameter.ndim, _readable(child, name, parameter)


def _readable(module: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    import torch

    value: torch.Tensor | None = parameter.detach()
    if parameter.device.type == "meta":
        value = _offloaded(module, name)
    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    # Quantised weights are integers or tensor subclasses.
    return value if type(value) is torch.Tensor and value.dtype in plain else None


def _offloaded(module: nn.Module, name: str) -> torch.Tensor | None:
    """Read a weight that accelerate keeps in RAM or on disk, without moving the module."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            value: torch.Tensor = weights[name]
            return value.detach()
    return None


def _rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    step = max(1, matrix.shape[0] // count)
    return matrix[::step][:count]


def _hash(tensors: Sequence[torch.Tensor | None]) -> str | None:
    import torch

    if not tensors or any(tensor is None for tensor in tensors):
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        assert tensor is not None
        value = tensor.to(torch.bfloat16).to("cpu", torch.float32)
        value = torch.where(value.abs() < _FLUSH_BELOW, torch.zeros_like(value), value)
        digest.update(json.dumps(list(value.shape)).encode())
        digest.update(value.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()
