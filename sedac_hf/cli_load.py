"""Loading models for the commands: device, data type, artefact, base, tokenizer."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from sedac_hf.base_resolution import HubOptions, load_base, read_config_of
from sedac_hf.cli_support import Screen, UsageError
from sedac_hf.evaluation.environment import machine, software_versions
from sedac_hf.modeling import SedacForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Loaded",
    "conditions_line",
    "has_thresholds",
    "let_exits_act",
    "load",
    "load_base_model",
    "pick_device",
    "pick_dtype",
    "read_model_config",
    "seed_everything",
]

DTYPES = ("float32", "bfloat16", "float16")


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    set_seed(seed)


def pick_device(device: str) -> torch.device:
    """The device to run on.

    Args:
        device: A torch device, or `auto`: the first GPU, else the CPU.

    Raises:
        UsageError: If there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device} cannot be used here: {reason}") from error


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; without them bf16 is slower than f32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    mkldnn: Any = getattr(torch.ops, "mkldnn", None)
    return bool(mkldnn is not None and mkldnn._is_mkldnn_bf16_supported())


def pick_dtype(dtype: str, device: torch.device, certified: list[str]) -> tuple[str, str]:
    """The data type to run in, and why.

    Args:
        dtype: What was asked; `auto` picks the fastest that a certificate covers.
        device: Where the model runs.
        certified: Data types that the artefact's certificate covers; empty without one.

    Returns:
        Name of the data type, and the reason in a few words.

    Raises:
        UsageError: If the name is unknown.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"--dtype must be auto or one of {', '.join(DTYPES)}, found {dtype}.")
        return dtype, "as asked"
    if device.type != "cpu" or cpu_computes_bf16():
        name, reason = "bfloat16", "fast here"
    else:
        name, reason = "float32", "this CPU has no bf16 instructions"
    if certified and name not in certified:
        return certified[0], "as certified"
    return name, reason


@dataclass(frozen=True)
class Loaded:
    """A model, ready to run, and how it runs.

    Attributes:
        name: What the user called it.
        model: The wrapper.
        tokenizer: Its tokenizer.
        dtype: Name of the data type.
        reason: Why that one.
    """

    name: str
    model: SedacForCausalLM
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    reason: str


def load(
    name: str, *, base: str | None, mode: str | None, device: str, dtype: str, screen: Screen
) -> Loaded:
    """Load an artefact (or a plain base) with its tokenizer.

    Args:
        name: Folder or Hub name.
        base: Where the base is, if not where the artefact says.
        mode: Mode to run in; None for the artefact's own.
        device: Torch device or `auto`.
        dtype: Data type or `auto`.
        screen: For progress.

    Returns:
        The model in evaluation mode.

    Raises:
        UsageError: If there is nothing under that name.
        SedacError: If artefact or base cannot be used.
    """
    with screen.status(f"loading {name}"):
        _hush(screen)
        config = read_model_config(name)
        place = pick_device(device)
        certified = list(config.get("certified_dtypes") or [])
        chosen, reason = pick_dtype(dtype, place, certified)
        arguments: dict[str, Any] = {"dtype": chosen, "mode": mode}
        if base is not None:
            read_model_config(base)
            arguments["base_model"] = base
        wrapper: Any = SedacForCausalLM.from_pretrained(name, **arguments)
        model: SedacForCausalLM = wrapper.to(place).eval()
        elsewhere = base or config.get("base_model_name_or_path")
        tokenizer = _tokenizer(name, str(elsewhere) if elsewhere else None)
    return Loaded(name, model, tokenizer, chosen, reason)


def load_base_model(
    name: str, *, device: str, dtype: str, screen: Screen
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a plain base with its tokenizer.

    Args:
        name: Folder or Hub name.
        device: Torch device or `auto`.
        dtype: Data type or `auto`.
        screen: For progress.

    Returns:
        The base, its tokenizer, and why it has its data type.

    Raises:
        UsageError: If there is no base under that name.
    """
    _hush(screen)
    if read_model_config(name).get("model_type") == "sedac":
        raise UsageError(f"{name} is an artefact already; name the base model to fit exits to.")
    place = pick_device(device)
    chosen, reason = pick_dtype(dtype, place, [])
    base: Any = load_base(name, None, HubOptions(), {"dtype": chosen})
    return base.to(place).eval(), _tokenizer(name, None), reason


def read_model_config(name: str) -> dict[str, Any]:
    """Read config.json of a model folder or a repository on the Hub.

    Raises:
        UsageError: If there is nothing under that name, or no config.json in it.
    """
    if Path(name).exists() and not Path(name).is_dir():
        raise UsageError(f"{name} is a file; give the folder of a model, or its name on the Hub.")
    try:
        path = read_config_of(name, HubOptions())
    except OSError as error:
        raise UsageError(
            f"there is no model folder {name!r} here, and none of that name could be had from the "
            f"Hub: {str(error).splitlines()[0]}"
        ) from error
    if path is None:
        raise UsageError(f"{name} holds no config.json, so it is no model folder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _hush(screen: Screen) -> None:
    talk: Any = logging
    talk.disable_progress_bar()
    if screen.quiet:
        talk.set_verbosity_error()


def _tokenizer(name: str, elsewhere: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of its base where an artefact was saved without one."""
    auto: Any = AutoTokenizer
    try:
        return cast("PreTrainedTokenizerBase", auto.from_pretrained(name))
    except (OSError, ValueError) as error:
        if elsewhere is None:
            raise UsageError(f"{name} has no tokenizer that can be loaded: {error}") from error
        return cast("PreTrainedTokenizerBase", auto.from_pretrained(elsewhere))


def has_thresholds(loaded: Loaded) -> bool:
    """Whether there are thresholds by which exits could act, certified or not."""
    certificate = loaded.model.certificate
    return loaded.model.cascade is not None or bool(certificate and certificate.walk)


def let_exits_act(loaded: Loaded) -> str:
    """Let exits act in certified mode although nothing covers them here.

    Without thresholds of its own the model takes those of the safest policy that was tested.

    Args:
        loaded: The model; its thresholds are set.

    Returns:
        What that means, in words.

    Raises:
        UsageError: If there are no thresholds at all.
    """
    model, certificate = loaded.model, loaded.model.certificate
    covered = model.cascade is not None and not model.exits_off_reason and certificate is not None
    if covered:
        return "These thresholds are certified: exits act as they would without --uncertified."
    # In certified mode, why exits would be off was said when the artefact was loaded.
    said = model.exits_off_reason is not None and model.config.mode == "certified"
    thresholds = "its own thresholds"
    if model.cascade is not None:
        why = model.exits_off_reason or "No certificate comes with the artefact."
        model.set_cascade(model.cascade)
    elif certificate is not None and certificate.walk:
        thresholds = "the safest thresholds that were tested"
        why = certificate.statement()
        model.set_cascade(certificate.walk[0].policy.cascade)
    else:
        raise UsageError(f"{loaded.name} has no thresholds, so no token can leave. Fit it first.")
    note = f"NOT CERTIFIED: exits act all the same, by {thresholds}."
    return note if said else f"{note} {why}"


def conditions_line(loaded: Loaded) -> str:
    """The conditions of a measurement in one line."""
    here, versions = machine(), software_versions()
    device = here.get("accelerator") if loaded.model.device.type != "cpu" else here["processor"]
    return (
        f"{loaded.dtype} ({loaded.reason}), batch 1, threads: {here['threads']}, on "
        f"{device or loaded.model.device.type}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )
