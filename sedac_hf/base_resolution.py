"""Where an artefact and its base are found: a folder, the Hub, or an object that is given."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._validators import validate_repo_id
from transformers import AutoModelForCausalLM
from transformers.utils.hub import cached_file, resolve_revision

from sedac_hf.artefact_format import (
    BASE_FOLDER,
    CARD_SOURCE_FILE,
    CERTIFICATE_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_json,
)
from sedac_hf.errors import ArtefactError, BaseNotFoundError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "OWN_BASE",
    "HubOptions",
    "base_origin",
    "cached_commit",
    "fetch_artefact",
    "find_base",
    "has_tokenizer",
    "is_hub_name",
    "load_base",
    "pinned_revision",
    "portable_base_name",
    "read_config_of",
]

logger = logging.getLogger(__name__)

# A base that is part of the artefact; no name on the Hub can look like this.
OWN_BASE = f"./{BASE_FOLDER}"

# What the script in examples/ makes; the bundled artefact names it.
_REFERENCE_MODEL = "smollm2-135m-instruct"

_COMMIT = re.compile("[0-9a-f]{40}")

# Arguments that transformers passes on internally and that no base loader should see.
_INTERNAL = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision")


@dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub: those arguments of `from_pretrained` that are not about the model.

    Attributes:
        revision: Branch, tag or commit of the artefact (not of its base).
        subfolder: Folder of the artefact inside its repository (not of its base).
        token: Access token, for the artefact and for its base.
        cache_dir: Where downloads are kept.
        local_files_only: Whether to use the cache alone.
        force_download: Whether to fetch again what is in the cache.
        proxies: Proxy servers by protocol.
    """

    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    proxies: dict[str, str] | None = None

    @classmethod
    def split(cls, arguments: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
        """Part the arguments of `from_pretrained` into those for the Hub and those for the base.

        Args:
            arguments: Keyword arguments of the user and of transformers.

        Returns:
            The options, and what the base's own `from_pretrained` is to be given.

        Raises:
            ConfigError: If an argument is given that has no meaning here.
        """
        rest = {key: value for key, value in arguments.items() if key not in _INTERNAL}
        for name in ("state_dict", "output_loading_info"):
            if rest.pop(name, None):
                raise ConfigError(
                    f"{name} is not supported: an artefact is loaded strictly or not at all. Load "
                    "the base yourself and pass it as base_model."
                )
        names = [name for name in cls.__dataclass_fields__ if name in rest]
        options = {name: rest.pop(name) for name in names}
        options["subfolder"] = options.get("subfolder") or ""
        if rest.get("trust_remote_code") is None:
            # The artefact chooses the base: only the user may let the base's code run.
            rest.pop("trust_remote_code", None)
        return cls(**options), rest

    def shared(self) -> dict[str, Any]:
        """What holds for artefact and base alike."""
        values = {
            "token": self.token,
            "cache_dir": self.cache_dir,
            "proxies": self.proxies,
            "local_files_only": self.local_files_only or None,
            "force_download": self.force_download or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def is_hub_name(name: str) -> bool:
    """Whether a string could name a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_config_of(source: str, options: HubOptions) -> Path | None:
    """Fetch config.json of a model folder or repository; None when it has none."""
    path: str | None = cached_file(
        source,
        CONFIG_FILE,
        revision=options.revision,
        subfolder=options.subfolder,
        _raise_exceptions_for_missing_entries=False,
        **options.shared(),
    )
    return Path(path) if path else None


def has_tokenizer(name: str, revision: str | None) -> bool:
    """Whether a folder or a repository holds a tokenizer of its own."""
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    files = ("tokenizer_config.json", "tokenizer.json")
    return any(cached_file(name, file, **options) is not None for file in files)


def fetch_artefact(source: str, options: HubOptions) -> Path:
    """Fetch the files of an artefact, all from one commit.

    Args:
        source: Folder or Hub name.
        options: How to reach the Hub; `revision` may name a branch.

    Returns:
        Local folder that holds them.

    Raises:
        ArtefactError: If the weights cannot be had.
    """
    revision = resolve_revision(
        None if os.path.isdir(source) else source,
        options.revision,
        token=options.token,
        local_files_only=options.local_files_only,
        cache_dir=options.cache_dir,
    )
    arguments = {**options.shared(), "subfolder": options.subfolder, "revision": revision}
    optional = {**arguments, "_raise_exceptions_for_missing_entries": False}
    try:
        cached_file(source, CONFIG_FILE, **arguments)
        weights = cached_file(source, WEIGHTS_FILE, **arguments)
        for name in (CERTIFICATE_FILE, CARD_SOURCE_FILE):
            cached_file(source, name, **optional)
    except OSError as error:
        raise ArtefactError(f"{source} is no complete artefact: {error}") from error
    assert weights is not None  # a missing entry raises
    return Path(weights).parent


def find_base(name: str, revision: str | None, artefact: Path | None) -> str:
    """Find the base that an artefact names.

    Relative paths are looked for in the artefact's folder, in its parents, and in the current
    directory, so that a repository which holds both can be put anywhere.

    Args:
        name: `base_model_name_or_path` of the artefact.
        revision: Pinned commit; a base that has one lives on the Hub.
        artefact: Folder of the artefact; None when there is none.

    Returns:
        Path of a folder, or a Hub name.

    Raises:
        BaseNotFoundError: If it is a path and there is no such folder.
    """
    if revision is not None and is_hub_name(name):
        return name
    path = Path(name).expanduser()
    places = [Path.cwd()]
    if artefact is not None and not path.is_absolute():
        folder = artefact.resolve()
        places = [folder, *folder.parents, Path.cwd()]
    for place in places:
        if (place / path / CONFIG_FILE).is_file():
            return str(path if place == Path.cwd() else place / path)
    if not path.is_absolute() and is_hub_name(name):
        return name
    looked = [str(path)] if path.is_absolute() else [str(place) for place in dict.fromkeys(places)]
    raise BaseNotFoundError(_not_found(name, looked))


def load_base(
    name: str, revision: str | None, options: HubOptions, arguments: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a base with its own `from_pretrained`.

    Args:
        name: Folder or Hub name.
        revision: Commit, tag or branch of the base.
        options: How to reach the Hub.
        arguments: Everything else the user gave: dtype, device_map, quantization_config, ...

    Returns:
        The base, in evaluation mode as transformers loads it.

    Raises:
        BaseNotFoundError: If it cannot be loaded from there.
    """
    if revision is not None and not os.path.isdir(name):
        arguments = {**arguments, "revision": revision}
    try:
        base = AutoModelForCausalLM.from_pretrained(name, **options.shared(), **arguments)
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        raise BaseNotFoundError(
            f"The base model {name!r}{at} cannot be loaded: {error}\nGive it as base_model=... "
            "(--base on the command line) if it is elsewhere."
        ) from error
    return cast("PreTrainedModel", base)


def pinned_revision(name: str, revision: str | None, options: HubOptions) -> str | None:
    """The commit that a revision of a Hub model stands for; None for folders and when unknown."""
    if os.path.isdir(name) or not is_hub_name(name):
        return None
    resolved = resolve_revision(
        name,
        revision,
        token=options.token,
        local_files_only=options.local_files_only,
        cache_dir=options.cache_dir,
    )
    # A revision that could not be resolved comes back as a plain string.
    commit = getattr(resolved, "resolved", None) or revision
    return commit if commit and _COMMIT.fullmatch(commit) else None


def cached_commit(name: str) -> str | None:
    """The commit of a Hub model in the cache when there is only one, so that it must be that.

    A loaded model does not know the commit that it came from.
    """
    if os.path.isdir(name) or not is_hub_name(name):
        return None
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    commits = [entry.name for entry in folder.glob("snapshots/*") if (entry / CONFIG_FILE).exists()]
    return commits[0] if len(commits) == 1 and _COMMIT.fullmatch(commits[0]) else None


def base_origin(name: str) -> tuple[str | None, str]:
    """Which model on the Hub a base is or was made from, and a note on the difference.

    Args:
        name: Folder or Hub name. A folder may hold a `source.json` with `base` and `note`.

    Returns:
        Hub name or None, and a sentence or nothing.
    """
    if not os.path.isdir(name):
        return (name if is_hub_name(name) else None), ""
    record = Path(name, "source.json")
    made_from = read_json(record) if record.is_file() else {}
    base = str(made_from.get("base", ""))
    return (base if base and is_hub_name(base) else None), str(made_from.get("note", ""))


def portable_base_name(name: str, artefact: Path) -> str:
    """Write a base's path so that it is found again when both folders move together.

    An absolute path becomes relative to the current directory if base and artefact lie in it.
    """
    path, here = Path(name), Path.cwd()
    both_here = path.is_relative_to(here) and artefact.resolve().is_relative_to(here)
    return path.relative_to(here).as_posix() if path.is_absolute() and both_here else name


def _not_found(name: str, looked: list[str]) -> str:
    message = (
        f"The artefact names the base model {name!r}, and there is no such model folder; looked "
        f"in: {', '.join(looked)}. Give the base as base_model=... (--base on the command line)."
    )
    if Path(name).name == _REFERENCE_MODEL:
        message += (
            " This one is made by `python examples/get_reference_model.py` in the sedac_hf "
            "repository (`make setup` runs it)."
        )
    return message
