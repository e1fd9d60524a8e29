"""Load an artefact onto its base: everything is checked before a model is put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sedac_hf.artefact_checks import check_base, read_certificate, why_exits_stay_off
from sedac_hf.artefact_format import (
    BASE_FOLDER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ArtefactFiles,
    ArtefactOrigin,
    read_artefact,
    read_json,
    tensors_digest,
)
from sedac_hf.artefact_parts import ArtefactParts, blamed_on, build_parts
from sedac_hf.base_resolution import (
    OWN_BASE,
    HubOptions,
    fetch_artefact,
    find_base,
    load_base,
    pinned_revision,
    read_config_of,
)
from sedac_hf.config import MODES, CheckpointSpec, SedacConfig
from sedac_hf.core.support import unwrap_adapter
from sedac_hf.errors import ArtefactError, BaseNotFoundError, ConfigError, ModeError
from sedac_hf.fingerprint import compare, dtype_name, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sedac_hf.calibration.certificate import Certificate
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["load"]

logger = logging.getLogger(__name__)

# Fields of SedacConfig that config.json must have; the rest comes from the base.
_FIELDS = (
    "base_model_name_or_path",
    "base_model_revision",
    "certified_dtypes",
    "fingerprint",
    "kv_mode",
    "mode",
    "probe_rank",
    "probe_target",
    "strategy",
)
# Fields that artefacts of earlier versions lack.
_LATER_FIELDS = ("head_hits", "max_pending")


def load(
    path_or_hub_name: str | os.PathLike[str],
    base_model: nn.Module | str | os.PathLike[str] | None = None,
    *,
    mode: str | None = None,
    base_revision: str | None = None,
    config: Any = None,
    **arguments: Any,
) -> SedacForCausalLM:
    """Load an artefact and attach it to its base.

    A plain base in place of an artefact gives a wrapper with exits off.

    Args:
        path_or_hub_name: Folder or Hub name.
        base_model: The base: a loaded model, a folder or a Hub name; by default the one that the
            artefact names.
        mode: Mode to run in by default, in place of the artefact's own.
        base_revision: Revision of the base; by default the commit pinned in the artefact.
        config: A configuration that the Auto classes have read already.
        **arguments: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`,
            `force_download` and `proxies` say how to fetch; the rest (`dtype`, `device_map`,
            `quantization_config`, `attn_implementation`, `trust_remote_code`, ...) is for the base.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArtefactError: If a file is missing or damaged, or tensors do not fit.
        FormatVersionError: If the format is not known.
        BaseNotFoundError: If the base cannot be found.
        FingerprintError: If the base is another one: always when its shape differs; when only its
            weights do, in certified mode.
    """
    source = os.fspath(path_or_hub_name)
    options, rest = HubOptions.split(arguments)
    rest = _with_settings_of(config, rest)
    wanted = mode if mode is not None else _mode_of(config)
    if wanted is not None and wanted not in MODES:
        raise ModeError(f"mode must be one of {MODES}, found {wanted!r}.")
    if not _is_artefact(source, options):
        return _wrap_plain(source, base_model, options, rest)
    files = read_artefact(fetch_artefact(source, options), source)
    with blamed_on(files.directory / CONFIG_FILE):
        specs = [CheckpointSpec.from_dict(point) for point in _field(files, "checkpoints")]
        values = {name: _field(files, name) for name in _FIELDS}
        values |= {name: files.config[name] for name in _LATER_FIELDS if name in files.config}
        if wanted is not None:
            values["mode"] = wanted
        _check_values(values, specs)
    certificate = read_certificate(files)
    base, values = _resolve_base(files, base_model, base_revision, options, rest, values)
    match = compare(values["fingerprint"], fingerprint(base))
    refusal = check_base(files, match, values["mode"])
    parts = build_parts(files, base, specs, values["probe_rank"])
    return _assemble(files, base, specs, parts, values, certificate, refusal)


def _wrap_plain(
    source: str,
    base_model: nn.Module | str | os.PathLike[str] | None,
    options: HubOptions,
    rest: Mapping[str, Any],
) -> SedacForCausalLM:
    """Wrap a base that comes without an artefact, and say how to fit one."""
    from sedac_hf.modeling import SedacForCausalLM

    if base_model is not None:
        raise ArtefactError(
            f"{source} is not an artefact of sedac_hf (its config.json does not say model_type "
            "'sedac'), so there is nothing to attach to base_model. Give an artefact, or wrap the "
            "base with SedacForCausalLM.from_base."
        )
    revision = pinned_revision(source, options.revision, options)
    where = {"subfolder": options.subfolder} if options.subfolder else {}
    base = load_base(source, revision or options.revision, options, {**rest, **where})
    model = SedacForCausalLM.from_base(
        base, base_model_name_or_path=source, base_model_revision=revision, mode="off"
    )
    logger.warning(
        "%s is a plain model without early exits: it runs as it is. Fit exits for it with "
        "`sedac fit %s -o OUT`, or sedac_hf.fit(base).",
        source,
        source,
    )
    return model


def _resolve_base(
    files: ArtefactFiles,
    base_model: nn.Module | str | os.PathLike[str] | None,
    revision: str | None,
    options: HubOptions,
    rest: dict[str, Any],
    values: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base, loaded, and the configuration with what it is called."""
    named, pinned = values["base_model_name_or_path"], values["base_model_revision"]
    if isinstance(base_model, nn.Module):
        base: Any = unwrap_adapter(base_model)
        _check_settings(base, rest)
        return base, values
    if base_model is None and named is None:
        raise BaseNotFoundError(
            f"The artefact {files.source} does not name its base. Give it as base_model=... "
            "(--base on the command line)."
        )
    rest = {**rest, "dtype": _dtype(files, rest)}
    rest.pop("torch_dtype", None)
    if base_model is None and named == OWN_BASE and not os.path.isdir(files.source):
        commit = pinned_revision(files.source, options.revision, options)
        folder = "/".join(part for part in (options.subfolder, BASE_FOLDER) if part)
        revision = commit or options.revision
        return load_base(files.source, revision, options, {**rest, "subfolder": folder}), values
    name = named if base_model is None else os.fspath(base_model)
    if revision is None and name == named:
        revision = pinned
    where = find_base(name, revision, files.directory if base_model is None else None)
    base = load_base(where, revision, options, rest)
    if base_model is not None:
        commit = pinned_revision(where, revision, options)
        values = {**values, "base_model_name_or_path": name, "base_model_revision": commit}
    return base, values


def _assemble(
    files: ArtefactFiles,
    base: PreTrainedModel,
    specs: list[CheckpointSpec],
    parts: ArtefactParts,
    values: dict[str, Any],
    certificate: Certificate | None,
    refusal: str | None,
) -> SedacForCausalLM:
    from sedac_hf.modeling import SedacForCausalLM

    reason, cascade = why_exits_stay_off(base, parts.cascade, values["kv_mode"], certificate)
    with blamed_on(files.directory / WEIGHTS_FILE):
        model = SedacForCausalLM.from_base(
            base,
            specs,
            cascade,
            heads=parts.heads,
            probes=parts.probes,
            draft_vocabulary=parts.draft_vocabulary,
            gates=parts.gates,
            **values,
        )
    model.certificate = certificate
    # A base with adapters or quantised weights is none to narrow, yet good for hard exits.
    soft = cascade is not None and cascade.is_soft
    model.set_channel_order(parts.channel_order, check=soft)
    model.risk_histograms = parts.risk_histograms
    model.origin = ArtefactOrigin(
        files.source, files.directory, tensors_digest(files.tensors), files.card
    )
    model.config.name_or_path = files.source
    if refusal is not None:
        model.refused_modes["certified"] = refusal
    elif reason is not None:
        model.exits_off_reason = reason
        if values["mode"] == "certified":
            logger.warning(
                "%s runs with exits off in certified mode: %s To let exits act all the same, call "
                "model.set_cascade(model.cascade).",
                files.source,
                reason,
            )
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _check_values(values: Mapping[str, Any], specs: list[CheckpointSpec]) -> None:
    """Let the configuration check its fields while no base is known."""
    SedacConfig(checkpoints=[spec.to_dict() for spec in specs], **values)
    if not isinstance(values["fingerprint"], dict):
        raise ArtefactError("fingerprint must be a JSON object; save the artefact again")


def _check_settings(base: PreTrainedModel, rest: Mapping[str, Any]) -> None:
    """Refuse settings for loading a base that is loaded already, unless it has them."""
    asked = {name: value for name, value in rest.items() if value not in (None, False, "auto")}
    dtype = asked.pop("dtype", None) or asked.pop("torch_dtype", None)
    if dtype is not None and str(dtype).removeprefix("torch.") != dtype_name(base):
        asked["dtype"] = dtype
    if asked:
        raise ConfigError(
            f"{asked} say how to load a base, but base_model is a loaded one ({dtype_name(base)}). "
            "Load it as you want it, or give its name as base_model."
        )


def _field(files: ArtefactFiles, name: str) -> Any:
    if name not in files.config:
        raise ArtefactError(f"the field {name!r} is missing")
    return files.config[name]


def _dtype(files: ArtefactFiles, rest: Mapping[str, Any]) -> Any:
    """The dtype asked for, else the one that the artefact was certified or fitted in."""
    asked = rest.get("dtype") or rest.get("torch_dtype")
    if asked not in (None, "auto"):
        return asked
    certified = files.config.get("certified_dtypes") or []
    fitted = (files.config.get("text_config") or {}).get("dtype")
    return (certified[0] if certified else fitted or "auto").partition("/")[0]


def _is_artefact(source: str, options: HubOptions) -> bool:
    try:
        path = read_config_of(source, options)
    except OSError as error:
        raise ArtefactError(
            f"{source} is neither a folder nor found on the Hub: {error}"
        ) from error
    return path is not None and read_json(path).get("model_type") == SedacConfig.model_type


def _mode_of(config: Any) -> str | None:
    return config.mode if isinstance(config, SedacConfig) else None


def _with_settings_of(config: Any, rest: dict[str, Any]) -> dict[str, Any]:
    """The Auto classes put the attention implementation into the configuration they read."""
    asked = getattr(config, "_attn_implementation_internal", None)
    return {"attn_implementation": asked, **rest} if asked else rest
