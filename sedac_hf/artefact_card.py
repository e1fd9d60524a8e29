"""The card of one artefact, from what is at hand when it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sedac_hf.artefact_format import BASE_FOLDER
from sedac_hf.base_resolution import OWN_BASE, base_origin
from sedac_hf.evaluation.environment import software_versions
from sedac_hf.model_card import CardSource, model_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from sedac_hf.calibration.certificate import Certificate

__all__ = ["card_of", "local_label", "report_for_card"]

# Kept elsewhere, or too long for what a card needs.
_LEFT_OUT = ("certificate", "per_document")


def card_of(
    label: str,
    config: Mapping[str, Any],
    *,
    size: int,
    base: str,
    certificate: Certificate | None,
    results: Mapping[str, Any],
    metadata: Mapping[str, Any],
    chat: bool,
) -> ModelCard:
    """Write a card.

    Args:
        label: What a user loads: a Hub name or a path.
        config: Content of config.json.
        size: Bytes of sedac.safetensors.
        base: Where the base was loaded from.
        certificate: The certificate, or None.
        results: Report of fit and evaluation.
        metadata: Further fields of the metadata.
        chat: Whether the tokenizer has a chat template.

    Returns:
        The card.
    """
    base_model, note = base_origin(base)
    source = CardSource(
        name=label,
        config=config,
        size=size,
        certificate=certificate.to_dict() if certificate else None,
        certified=certificate is not None and certificate.policy is not None,
        results=results,
        chat=chat,
        base_model=base_model,
        base_note=_base_note(config, note),
        versions=software_versions(),
        metadata=metadata,
    )
    return model_card(source)


def report_for_card(results: Mapping[str, Any]) -> dict[str, Any]:
    """Bring reports into the form that is kept and that the card reads.

    Args:
        results: An evaluation's report, with the fit's under "fit"; or both under "eval" and "fit".

    Returns:
        The evaluation's report with the fit's under "fit": JSON values, None for numbers that are
        not finite.
    """
    flat = {key: value for key, value in results.items() if key != "eval"}
    plain: dict[str, Any] = _plain({**flat, **(results.get("eval") or {})})
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def local_label(target: Path) -> str:
    """What a card tells a user to load: the path from here, without what is private about it."""
    folder, here = target.resolve(), Path.cwd()
    return folder.relative_to(here).as_posix() if folder.is_relative_to(here) else folder.name


def _base_note(config: Mapping[str, Any], note: str) -> str:
    """How the base is found."""
    name, revision = config.get("base_model_name_or_path"), config.get("base_model_revision")
    if name is None:
        found = "Its base is not named: pass the model as `base_model=`."
    elif name == OWN_BASE:
        found = f"Its base is part of it (folder `{BASE_FOLDER}`)."
    elif revision:
        found = f"Its base is fetched with it, at commit `{revision}`."
    elif Path(name).is_absolute() or name.startswith("."):
        found = (
            f"Its base is the model folder `{name}`, looked for in the artefact's folder, in its "
            "parents and in the current directory; `base_model=` names another place."
        )
    else:
        found = f"Its base `{name}` is fetched with it."
    return f"{found} {note}".strip()
