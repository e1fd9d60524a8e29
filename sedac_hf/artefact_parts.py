"""Between a model's parts and the tensors of an artefact, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sedac_hf.artefact_format import RISKS_PREFIX, WEIGHTS_FILE, ArtefactFiles
from sedac_hf.calibration.drift import RiskHistograms
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.core.channel_order import CHANNELS_PREFIX, ChannelOrder
from sedac_hf.core.exit_heads import ExitHead
from sedac_hf.core.exit_parts import build_heads
from sedac_hf.core.gate_parts import CLASSES_KEY, FUSION_PREFIX, GateParts
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.errors import ArtefactError, ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sedac_hf.config import CheckpointSpec
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["ArtefactParts", "artefact_tensors", "blamed_on", "build_parts"]


@dataclass(frozen=True)
class ArtefactParts:
    """What becomes part of a model.

    Attributes:
        heads: One exit head per checkpoint.
        probes: One risk probe per checkpoint.
        draft_vocabulary: Token ids, int64, or None for the whole vocabulary.
        cascade: The rules by which tokens leave, or None.
        risk_histograms: Risks of calibration, or None; artefacts of earlier versions have none.
        channel_order: Order of the MLPs' channels, or None; likewise.
        gates: Fusion weights and classes of tokens; empty in artefacts without them.
    """

    heads: list[ExitHead]
    probes: ProbeManager
    draft_vocabulary: Tensor | None
    cascade: CascadeConfig | None
    risk_histograms: RiskHistograms | None
    channel_order: ChannelOrder | None
    gates: GateParts


def artefact_tensors(model: SedacForCausalLM) -> dict[str, Tensor]:
    """What is stored of a model: heads in bf16, probes in float32, draft vocabulary and rules.

    Histograms of risks and the order of channels are among it where the model has them.

    Args:
        model: The model.

    Returns:
        Name -> tensor on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    for k, head in enumerate(model.exit_heads):
        for key, value in cast(ExitHead, head).export_tensors(model.shell).items():
            tensors[f"heads.{k}.{key}"] = value
    for key, value in model.probes.state_dict().items():
        tensors[key] = value.detach().cpu()
    if model.draft_vocabulary is not None:
        tensors["draft_vocabulary"] = model.draft_vocabulary.detach().cpu()
    tensors |= model.gates.to_tensors()
    if model.cascade is not None:
        tensors |= model.cascade.to_tensors()
    if model.risk_histograms is not None:
        tensors |= model.risk_histograms.to_tensors()
    if model.channel_order is not None:
        tensors |= model.channel_order.to_tensors()
    return tensors


def build_parts(
    files: ArtefactFiles, base: PreTrainedModel, specs: list[CheckpointSpec], rank: int
) -> ArtefactParts:
    """Heads, probes and rules from the tensors; every tensor must have its place.

    Args:
        files: The artefact.
        base: Its base, which is not changed.
        specs: The checkpoints.
        rank: Rank of the probes.

    Returns:
        The parts, each on the device of its checkpoint's layer.

    Raises:
        ArtefactError: If a tensor is missing, unexpected, or of another shape.
    """
    left = dict(files.tensors)
    path = files.directory / WEIGHTS_FILE
    with blamed_on(path):
        shell = BaseShell(base)
        heads = build_heads([spec.resolved(shell.num_layers) for spec in specs], shell)
        for k, head in enumerate(heads):
            head.import_tensors(_take(left, f"heads.{k}."), shell)
        width = int(base.config.get_text_config(decoder=True).hidden_size)
        probes = ProbeManager.build(len(specs), width, rank)
        _load_probes(probes, _take(left, "probes.", keep_prefix=True))
        for probe, head in zip(probes.probes, heads, strict=True):
            probe.to(next(head.parameters()).device)
        draft = left.pop("draft_vocabulary", None)
        rules = _take(left, "cascade.", keep_prefix=True)
        cascade = None
        if rules:
            layers = [spec.layer_idx for spec in specs]
            strategy = str(files.config.get("strategy", "hard"))
            cascade = CascadeConfig.from_tensors(rules, layers, strategy=strategy)
            rules = {name: v for name, v in rules.items() if name not in cascade.to_tensors()}
        risks = _take(left, RISKS_PREFIX, keep_prefix=True)
        histograms = RiskHistograms.from_tensors(risks, len(specs)) if risks else None
        channels = _take(left, CHANNELS_PREFIX, keep_prefix=True)
        order = ChannelOrder.from_tensors(channels, shell.num_layers) if channels else None
        fused = _take(left, FUSION_PREFIX, keep_prefix=True)
        fused |= _take(left, CLASSES_KEY, keep_prefix=True)
        gates = GateParts.from_tensors(fused, len(specs))
        if cascade is not None:
            gates.check(cascade)
        if left or rules:
            raise ArtefactError(f"it holds tensors that have no place: {sorted({**left, **rules})}")
    return ArtefactParts(heads, probes, draft, cascade, histograms, order, gates)


def _load_probes(probes: ProbeManager, tensors: dict[str, Tensor]) -> None:
    wanted = probes.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    wrong = [
        f"{name} is {list(tensors[name].shape)} and should be {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys())
        if wanted[name].shape != tensors[name].shape
    ]
    if missing or unexpected or wrong:
        raise ArtefactError(
            f"probes: missing {missing}, unexpected {unexpected}, wrong shape {wrong}"
        )
    probes.load_state_dict({name: tensors[name].to(torch.float32) for name in wanted})


def _take(tensors: dict[str, Tensor], prefix: str, keep_prefix: bool = False) -> dict[str, Tensor]:
    """Move the tensors whose names start with `prefix` out of a dictionary."""
    names = [name for name in tensors if name.startswith(prefix)]
    start = 0 if keep_prefix else len(prefix)
    return {name[start:]: tensors.pop(name) for name in names}


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Name the file in errors about what was read from it.

    Args:
        path: The file.

    Raises:
        ArtefactError: In place of what went wrong inside the block.
    """
    try:
        yield
    except UnsupportedModelError:
        raise
    except (ArtefactError, ConfigError, RuntimeError, TypeError, ValueError) as error:
        message = str(error).rstrip(".")
        raise ArtefactError(f"{path}: {message}. Fetch or fit the artefact again.") from error
