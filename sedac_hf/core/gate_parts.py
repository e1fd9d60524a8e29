"""What gates can be made of beside probes: learned fusion, and the class of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.core.fused_gates import CheckpointFusion, fusion_from_tensors, fusion_tensors
from sedac_hf.core.token_routing import TOKEN_CLASSES
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.core.cascade_config import CascadeConfig

__all__ = ["CLASSES_KEY", "FUSION_PREFIX", "GateParts"]

FUSION_PREFIX: Final = "fusion."
CLASSES_KEY: Final = "token_classes"


@dataclass(frozen=True, eq=False)
class GateParts:
    """Parts of an artefact that rules may use, or leave alone.

    Attributes:
        fusion: Fusion weights of each checkpoint; None without them.
        token_classes: Class of each token, an index into `TOKEN_CLASSES`, uint8 `[vocabulary]`;
            None without them.
    """

    fusion: tuple[CheckpointFusion, ...] | None = None
    token_classes: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Refuse classes that do not exist.

        Raises:
            ConfigError: If the table is no list of known classes.
        """
        table = self.token_classes
        if table is None:
            return
        known = len(TOKEN_CLASSES)
        if table.dtype != np.uint8 or table.ndim != 1 or (table >= known).any():
            raise ConfigError(
                f"token classes must be a list of bytes below {known}, found type {table.dtype}, "
                f"shape {table.shape}, greatest {table.max(initial=0)}."
            )

    def check(self, cascade: CascadeConfig) -> None:
        """Refuse rules that need parts which are not here.

        Args:
            cascade: The rules.

        Raises:
            ConfigError: If fusion, its networks or the classes of tokens are missing.
        """
        if cascade.fusion != "none":
            if self.fusion is None:
                raise ConfigError(
                    f"the rules fuse evidence ({cascade.fusion!r}), but the model has no fusion "
                    "weights. Fit them with sedac_hf.fit, or use rules with fusion 'none'."
                )
            if len(self.fusion) != len(cascade.layers):
                raise ConfigError(
                    f"the rules have {len(cascade.layers)} checkpoints, the fusion weights "
                    f"{len(self.fusion)}."
                )
        if cascade.routes:
            if self.token_classes is None:
                raise ConfigError(
                    "the rules differ by class of token, but the model has no table of classes. "
                    "Make one with sedac_hf.core.token_routing.token_classes."
                )
            if len(cascade.routes) != len(TOKEN_CLASSES):
                raise ConfigError(
                    f"the rules need one entry for each class of {TOKEN_CLASSES}, found "
                    f"{len(cascade.routes)}."
                )

    def only(self, k: int) -> GateParts:
        """The parts for a cascade of checkpoint `k` alone.

        Args:
            k: Which checkpoint.
        """
        fusion = None if self.fusion is None else self.fusion[k : k + 1]
        return GateParts(fusion, self.token_classes)

    def to_tensors(self) -> dict[str, Tensor]:
        """What there is, as tensors by name."""
        tensors = fusion_tensors(self.fusion)
        if self.token_classes is not None:
            tensors[CLASSES_KEY] = torch.tensor(self.token_classes)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], checkpoints: int) -> GateParts:
        """Inverse of `to_tensors`.

        Args:
            tensors: Those of the parts and no others.
            checkpoints: Number of checkpoints.

        Returns:
            The parts; empty for no tensors.

        Raises:
            ConfigError: If a tensor is missing, has no place, or holds what is not allowed.
        """
        fused = {name: value for name, value in tensors.items() if name != CLASSES_KEY}
        table = tensors.get(CLASSES_KEY)
        return cls(
            fusion=fusion_from_tensors(fused, checkpoints) if fused else None,
            token_classes=None if table is None else table.cpu().numpy(),
        )
