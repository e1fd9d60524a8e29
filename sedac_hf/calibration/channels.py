"""The order of channels for soft exits, measured on calibration documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.channel_order import ChannelOrder, measure_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sedac_hf.calibration.documents import Document

__all__ = ["ChannelOrder", "channel_order"]


def channel_order(
    base: PreTrainedModel, documents: Sequence[Document], *, tokens: int = 4096
) -> ChannelOrder:
    """Order the channels of a base's MLPs by importance, for soft exits.

    A channel's importance is the mean of its absolute value over tokens times the norm of its
    column in the projection back to the state. `fit` does this by itself.

    Args:
        base: The base model; it is not changed.
        documents: Calibration documents; as many of the first as `tokens` takes.
        tokens: About how many tokens to use. They run one document at a time.

    Returns:
        The order, for `SedacForCausalLM.set_channel_order`.

    Raises:
        ConfigError: If there are no documents.
        UnsupportedModelError: If the base has MLPs that cannot be narrowed.
    """
    return measure_order(BaseShell(base), documents, tokens=tokens)
