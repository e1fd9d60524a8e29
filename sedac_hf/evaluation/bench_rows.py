"""Rows of a benchmark: ratios and counts from the times and texts of one cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sedac_hf.evaluation.agreement import Divergence
from sedac_hf.evaluation.arms import Arm, Batch, on_modules
from sedac_hf.evaluation.benchmark import ratio_of

__all__ = ["OPPONENTS", "RIVALS", "Measured", "build_row"]

FloatArray = npt.NDArray[np.float64]

# What can be had without sedac_hf; not each of them works everywhere.
RIVALS = ("assistant_early_exit", "prompt_lookup", "llama_cpp")
OPPONENTS = ("generate", "plain", *RIVALS)


@dataclass(frozen=True)
class Measured:
    """What was measured of one prompt group at one batch size: a cell.

    Attributes:
        group: The prompt group.
        rows: Prompts of a batch.
        batches: The batches.
        arms: What was timed, by name, with its texts.
        seconds: Times by arm, `[rounds, batches]`.
        counts: Exit statistics by arm, as `ExitStats.to_dict` has them.
        equal: By mode, whether each row that was checked has the base's tokens in float32.
        apart: By mode, where rows part from the base's text in the timed data type.
        reasons: Why a rival was not timed, by name.
        notes: Remarks on a mode.
    """

    group: str
    rows: int
    batches: Sequence[Batch]
    arms: Mapping[str, Arm]
    seconds: Mapping[str, FloatArray]
    counts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    equal: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    apart: Mapping[str, Sequence[Divergence]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def pace(self, name: str) -> FloatArray:
        """Seconds of an arm for one new token of each row, `[rounds, batches]`."""
        tokens = [self.arms[name].new_tokens(batch) for batch in self.batches]
        return self.seconds[name] / np.asarray(tokens, dtype=np.float64)


def build_row(cell: Measured, name: str, *, head_share: float, seed: int) -> dict[str, Any]:
    """The row of a mode.

    Args:
        cell: What was measured.
        name: The mode's arm, or the rival that has a row of its own.
        head_share: Share of a full pass in the output head.
        seed: Seed of the bootstrap.

    Returns:
        Plain values. A ratio says how many times faster the mode is: the median over batches of
        paired times, beside it its 95 % interval (None with a single batch). Plain, in `vs_plain`
        and in `loop_gain`, is that on the same pass, so that exits and passes are told apart;
        `vs_modules` is the same mode on the base's own modules.
    """
    row: dict[str, Any] = {"mode": name, "group": cell.group, "batch": cell.rows}
    row["runs_on"] = _runs_on(cell, name)
    row["prompts"] = cell.rows * len(cell.batches)
    row["tokens_per_second"] = cell.rows / float(np.median(cell.pace(name)))
    plain = on_modules("plain") if name.endswith(on_modules("")) else "plain"
    for other in OPPONENTS:
        row |= _speed(f"vs_{other}", cell, plain if other == "plain" else other, name, seed)
    row |= _speed("vs_modules", cell, on_modules(name), name, seed)
    row |= _speed("loop_gain", cell, "generate", plain, seed)
    row |= _exits(cell.counts.get(name, {}))
    row["head_share"] = head_share
    row |= _agreement(cell, name)
    row["notes"] = [
        *cell.notes.get(name, ()),
        *(f"{rival}: {reason}" for rival, reason in cell.reasons.items()),
    ]
    return row


def _runs_on(cell: Measured, name: str) -> str:
    """What ran the layers: the native pass, the base's own modules, or another program."""
    if name == "llama_cpp":
        return name
    # Where nothing of ours takes part, the base runs as it always does.
    return cell.counts.get(name, {}).get("runs_on") or "modules"


def _speed(label: str, cell: Measured, other: str, name: str, seed: int) -> dict[str, Any]:
    if other not in cell.seconds or other == name:
        same = 1.0 if other == name else None
        return {label: same, f"{label}_ci95": None}
    # A prompt's rounds are no prompts of their own: the interval is over prompts.
    ratios = np.median(cell.pace(other) / cell.pace(name), axis=0)
    found = ratio_of(ratios, seed)
    interval = list(found.interval) if len(ratios) > 1 else None
    return {label: found.median, f"{label}_ci95": interval}


def _exits(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Acceptance of drafts and depth, as far as the mode counts them."""
    tokens = counts.get("tokens") or 0
    left = sum(counts.get("exits_by_layer", {}).values())
    drafts = counts.get("drafts") or {}
    offered = drafts.get("offered")
    # Where tails are not counted, each token that did not leave took one of its own.
    tails = counts.get("tails") or tokens - left
    shared = tokens / tails if tails else 1.0
    return {
        "acceptance": drafts["accepted"] / offered if offered else None,
        "tokens_per_tail_pass": drafts.get("tokens_per_pass") or shared,
        "exit_share": left / tokens if tokens else 0.0,
    }


def _agreement(cell: Measured, name: str) -> dict[str, Any]:
    equal, apart = cell.equal.get(name), cell.apart.get(name)
    worst = max(apart, key=_size, default=None) if apart is not None else None
    return {
        "token_equal": all(equal) if equal else None,
        "token_checked": len(equal or ()),
        "token_differing": sum(not same for same in equal or ()),
        "divergence_gap": worst.gap if worst else None if apart is None else 0.0,
        "divergence_units": worst.units if worst else None if apart is None else 0.0,
        "divergences": None if apart is None else len(apart),
    }


def _size(one: Divergence) -> float:
    """A gap; one that is not a number counts as the largest."""
    return one.gap if one.gap == one.gap else np.inf
