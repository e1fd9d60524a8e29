"""Loading, saving and sharing, as methods of the wrapper."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["ArtefactMethods"]


class ArtefactMethods:
    """Thin methods over `sedac_hf.artefact`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        base_model: nn.Module | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> SedacForCausalLM:
        """Load an artefact and attach it to its base.

        Args:
            pretrained_model_name_or_path: Folder or Hub name of an artefact, or of a plain base
                (which gives a wrapper with exits off).
            *model_args: Refused: everything goes by name.
            base_model: The base: a loaded model, a folder or a Hub name; by default the one that
                the artefact names.
            **kwargs: See `sedac_hf.artefact.load`: `mode`, how to reach the Hub, and what the
                base's own `from_pretrained` takes.

        Returns:
            The wrapper in evaluation mode.
        """
        from sedac_hf import artefact

        if model_args:
            raise ConfigError("from_pretrained takes its options by name only.")
        model: SedacForCausalLM = artefact.load(
            pretrained_model_name_or_path, base_model=base_model, **kwargs
        )
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save what was added to the base: probes, heads, thresholds, certificate, card.

        Args:
            save_directory: Folder to write.
            **kwargs: See `sedac_hf.artefact.save`.
        """
        from sedac_hf import artefact

        artefact.save(cast(Any, self), save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to the Hub, own card included.

        Args:
            repo_id: Name of the repository.
            **kwargs: See `sedac_hf.artefact.push`.

        Returns:
            What the Hub says of the commit.
        """
        from sedac_hf import artefact

        return artefact.push(cast(Any, self), repo_id, **kwargs)
