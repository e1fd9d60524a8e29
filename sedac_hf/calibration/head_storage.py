"""How a trained block is stored: whole, or as a low-rank difference to the base's layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sedac_hf.calibration.head_training import measure_agreement
from sedac_hf.core.exit_heads import build_exit_head
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.calibration.states import BaseStates
    from sedac_hf.config import CheckpointSpec
    from sedac_hf.core.base_shell import BaseShell
    from sedac_hf.core.exit_heads import ExitHead

logger = logging.getLogger(__name__)

_MOST_LOST = 0.01  # agreement that a delta may cost
_RANK_SHARE = 8  # rank of a delta: the width divided by this


def choose_storage(
    heads: Sequence[ExitHead],
    shell: BaseShell,
    states: BaseStates,
    rows: Sequence[int],
    storage: str = "auto",
) -> tuple[list[CheckpointSpec], list[ExitHead], list[dict[str, Any]]]:
    """Pass every head through its stored form, so that what is measured next is what is loaded.

    Args:
        heads: Trained heads.
        shell: Shell of the base.
        states: Recorded states.
        rows: Documents to measure agreement on.
        storage: `"whole"`, `"delta"` or `"auto"`.

    Returns:
        The checkpoints, the heads as they come back from storage, and what each choice cost.

    Raises:
        CalibrationError: If `storage` is something else.
    """
    if storage not in ("auto", "whole", "delta"):
        raise CalibrationError(f"storage must be 'auto', 'whole' or 'delta', found {storage!r}")
    kept, found = [], []
    for head in heads:
        whole = stored(head, shell, head.spec)
        entry: dict[str, Any] = {"layer_idx": head.layer_idx, "storage": "whole"}
        if head.spec.head == "block" and storage != "whole":
            rank = max(1, int(shell.base.config.get_text_config().hidden_size) // _RANK_SHARE)
            delta = stored(head, shell, replace(head.spec, storage="delta", delta_rank=rank))
            before = measure_agreement(whole, shell, states, rows)[0]
            after = measure_agreement(delta, shell, states, rows)[0]
            entry |= {"whole_agreement": before, "delta_agreement": after, "delta_rank": rank}
            if storage == "delta" or before - after < _MOST_LOST:
                whole, entry["storage"] = delta, "delta"
        logger.info("storage: %s", entry)
        kept.append(whole)
        found.append(entry)
    return [head.spec for head in kept], kept, found


def stored(head: ExitHead, shell: BaseShell, spec: CheckpointSpec) -> ExitHead:
    """A head as it comes back after being stored under `spec`."""
    copy = build_exit_head(spec, shell).to(head_device(head))
    copy.load_state_dict({n: t.to(shell.base.dtype) for n, t in head.state_dict().items()})
    copy.import_tensors(copy.export_tensors(shell), shell)
    return copy.requires_grad_(False).eval()


def head_device(head: ExitHead) -> Any:
    """Where a head's weights are."""
    return next(head.parameters()).device
