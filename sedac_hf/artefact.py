"""Save, load and share what was added to a base: `save`, `load`, `push`.

A folder or repository holds config.json, sedac.safetensors, certificate.json, README.md (the card),
card.json (what the card was made of), the tokenizer, and one line of code for users who load it
through transformers without importing sedac_hf first.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from torch import Tensor
from transformers import AutoTokenizer

from sedac_hf.artefact_card import card_of, local_label, report_for_card
from sedac_hf.artefact_format import (
    BASE_FOLDER,
    CARD_FILE,
    CARD_SOURCE_FILE,
    CERTIFICATE_FILE,
    FORMAT_VERSION,
    REMOTE_CODE_FILE,
    WEIGHTS_FILE,
    atomic_directory,
    tensors_digest,
    write_artefact,
    write_json,
)
from sedac_hf.artefact_loading import load
from sedac_hf.artefact_parts import artefact_tensors
from sedac_hf.base_resolution import OWN_BASE, cached_commit, has_tokenizer, portable_base_name
from sedac_hf.calibration.certificate import Certificate
from sedac_hf.errors import ArtefactError, CertificateError
from sedac_hf.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["artefact_tensors", "load", "push", "save"]

logger = logging.getLogger(__name__)

_REMOTE_CODE = (
    '"""Lets transformers load this artefact without importing sedac_hf first."""\n\n'
    "from sedac_hf import SedacConfig, SedacForCausalLM  # noqa: F401\n"
)
_AUTO_MAP = {
    "AutoConfig": "modeling_sedac.SedacConfig",
    "AutoModelForCausalLM": "modeling_sedac.SedacForCausalLM",
}
# Arguments of transformers' save_pretrained that mean nothing for a few megabytes of our own.
_IGNORED = {"max_shard_size", "safe_serialization", "save_peft_format", "save_original_format"}


@dataclass(frozen=True)
class _Content:
    """What goes into an artefact beside the configuration.

    Attributes:
        tensors: What `artefact_tensors` gives.
        certificate: The certificate, or None.
        tokenizer: The tokenizer, or None.
        results: Report of fit and evaluation for the card.
        metadata: Further fields of the card's metadata.
        with_base: Whether the base is saved as well.
    """

    tensors: dict[str, Tensor]
    certificate: Certificate | None
    tokenizer: PreTrainedTokenizerBase | None
    results: dict[str, Any]
    metadata: dict[str, Any]
    with_base: bool


def save(
    model: SedacForCausalLM,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    certificate: Certificate | Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    card_metadata: Mapping[str, Any] | None = None,
    save_base_model: bool = False,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **arguments: Any,
) -> None:
    """Save what was added to the base, whole or not at all.

    Args:
        model: The model.
        directory: Folder to write or replace; files in it that are no part of an artefact stay.
        tokenizer: The tokenizer; by default the one that the model's artefact or base has.
        certificate: The certificate; by default the model's own while its weights are those that it
            was issued for.
        results: Report for the card, see `sedac_hf.model_card`; adds to what the model came with.
        card_metadata: Further metadata for the card, such as `license`, `language` or `tags`.
        save_base_model: Whether to put the base into the folder as well, so that it stands alone.
        is_main_process: Whether this process writes.
        push_to_hub: Whether to push the same to the Hub afterwards.
        repo_id: Repository to push to; the folder's name by default.
        **arguments: Arguments of `push`; those of transformers about shards are ignored.

    Raises:
        ArtefactError: If the folder cannot be written or an argument is unknown.
        CertificateError: If the certificate was issued for other thresholds than the model's.
    """
    hub = {key: value for key, value in arguments.items() if key not in _IGNORED}
    if hub and not push_to_hub:
        raise ArtefactError(
            f"save_pretrained does not take {sorted(hub)}. See sedac_hf.artefact.save for what it "
            "takes; options of the Hub go with push_to_hub=True."
        )
    if not is_main_process:
        return
    target = Path(directory)
    content = _gather(model, tokenizer, certificate, results, card_metadata, save_base_model)
    with atomic_directory(target) as fresh:
        _write(model, fresh, target, local_label(target), content)
    if push_to_hub:
        _upload(model, repo_id or target.resolve().name, content, **hub)


def push(
    model: SedacForCausalLM,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    certificate: Certificate | Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    card_metadata: Mapping[str, Any] | None = None,
    tags: list[str] | None = None,
    save_base_model: bool = False,
    **options: Any,
) -> CommitInfo:
    """Save to a repository on the Hub, the card included, in one commit.

    Args:
        model: The model.
        repo_id: Name of the repository; made when it does not exist.
        tokenizer: As for `save`.
        certificate: As for `save`.
        results: As for `save`.
        card_metadata: As for `save`.
        tags: Further tags of the card.
        save_base_model: Whether to upload the base as well.
        **options: `commit_message`, `commit_description`, `private` (for a new repository),
            `token`, `revision` (branch to commit to, made when it does not exist), `create_pr`.

    Returns:
        What the Hub says of the commit.

    Raises:
        ArtefactError: If the artefact cannot be written.
        CertificateError: If the certificate was issued for other thresholds than the model's.
    """
    metadata = dict(card_metadata or {})
    if tags:
        metadata["tags"] = [*metadata.get("tags", []), *tags]
    content = _gather(model, tokenizer, certificate, results, metadata, save_base_model)
    hub = {key: value for key, value in options.items() if key not in _IGNORED}
    return _upload(model, repo_id, content, **hub)


def _gather(
    model: SedacForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    certificate: Certificate | Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
    with_base: bool,
) -> _Content:
    """Complete what the caller gave by what the model came with, and check that it fits."""
    tensors = artefact_tensors(model)
    origin = model.origin
    unchanged = origin is not None and origin.digest == tensors_digest(tensors)
    if isinstance(certificate, Mapping):
        certificate = Certificate.from_dict(certificate)
    if certificate is None and model.certificate is not None:
        if origin is None or unchanged:
            certificate = model.certificate
        else:
            logger.warning(
                "Heads, probes or thresholds have changed since the certificate was issued, so it "
                "is not saved with them. Certify again."
            )
    if certificate is not None:
        _check_thresholds(certificate, tensors)
    if with_base and hasattr(model.base, "peft_config"):
        raise ArtefactError(
            "The base carries adapters, which cannot be saved inside an artefact. Merge them first "
            "(merge_and_unload), or save without save_base_model."
        )
    before = origin.card if origin is not None and unchanged else {}
    return _Content(
        tensors=tensors,
        certificate=certificate,
        tokenizer=tokenizer or _find_tokenizer(model),
        results={**before.get("results", {}), **report_for_card(results or {})},
        metadata={**before.get("metadata", {}), **(metadata or {})},
        with_base=with_base,
    )


def _check_thresholds(certificate: Certificate, tensors: Mapping[str, Tensor]) -> None:
    policy = certificate.policy
    if policy is None:
        return
    for name, value in policy.cascade.to_tensors().items():
        if name not in tensors or tensors[name].tolist() != value.tolist():
            raise CertificateError(
                f"The certificate was issued for other thresholds ({name}) than the model's. Call "
                "model.set_cascade(certificate.policy.cascade) first, or certify again."
            )


def _find_tokenizer(model: SedacForCausalLM) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model's artefact or of its base."""
    pinned = model.config.base_model_revision
    names = [model.base.config.name_or_path, model.config.base_model_name_or_path]
    places = [(name, pinned or cached_commit(name)) for name in dict.fromkeys(names) if name]
    if model.origin is not None:
        places.insert(0, (str(model.origin.directory), None))
    for name, revision in places:
        try:
            # Without its files transformers would make up an empty tokenizer for some models.
            if has_tokenizer(name, revision):
                return AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            logger.debug("no tokenizer in %s: %s", name, error)
    logger.warning(
        "No tokenizer was found beside the model, so none is saved and pipeline() will not find "
        "one. Pass tokenizer=..."
    )
    return None


def _write(
    model: SedacForCausalLM, fresh: Path, target: Path, label: str, content: _Content
) -> None:
    """Write all files into the empty folder `fresh`, which will become `target`."""
    config = _config_values(model, target, content)
    issued = content.certificate.to_dict() if content.certificate else None
    write_artefact(fresh, config, content.tensors, issued)
    card_source = {"results": content.results, "metadata": content.metadata}
    write_json(fresh / CARD_SOURCE_FILE, card_source)
    (fresh / REMOTE_CODE_FILE).write_text(_REMOTE_CODE, encoding="utf-8")
    if content.tokenizer is not None:
        content.tokenizer.save_pretrained(fresh)
    if content.with_base:
        model.base.save_pretrained(fresh / BASE_FOLDER)
    card = card_of(
        label,
        {**config, "sedac_format_version": FORMAT_VERSION},
        size=(fresh / WEIGHTS_FILE).stat().st_size,
        base=model.base.config.name_or_path or "",
        certificate=content.certificate,
        results=content.results,
        metadata=content.metadata,
        chat=bool(getattr(content.tokenizer, "chat_template", None)),
    )
    card.save(fresh / CARD_FILE)


def _config_values(model: SedacForCausalLM, target: Path, content: _Content) -> dict[str, Any]:
    """Content of config.json, completed by what is only known when saving."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    for values in (config, config.get("text_config") or {}):
        values.pop("_name_or_path", None)
    issued = content.certificate
    name = config.get("base_model_name_or_path") or model.base.config.name_or_path or None
    config |= {
        "architectures": ["SedacForCausalLM"],
        "auto_map": _AUTO_MAP,
        "fingerprint": config.get("fingerprint") or fingerprint(model.base),
        "certified_dtypes": [issued.dtype] if issued and issued.policy else [],
    }
    if content.with_base:
        name, config["base_model_revision"] = OWN_BASE, None
    elif name and not config.get("base_model_revision"):
        config["base_model_revision"] = cached_commit(name)
    config["base_model_name_or_path"] = portable_base_name(name, target) if name else None
    return config


def _upload(
    model: SedacForCausalLM,
    repo_id: str,
    content: _Content,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        # Written before the repository is made: a model that cannot be saved leaves no trace.
        folder = Path(scratch) / "artefact"
        folder.mkdir()
        _write(model, folder, folder, repo_id, content)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload early exits",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            # A certificate that was there before says nothing about the new weights.
            delete_patterns=None if content.certificate else [CERTIFICATE_FILE],
        )
