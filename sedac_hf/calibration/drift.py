"""Whether the risks seen lately are still those of calibration.

``D = sum_b p_b ln(p_b / q_b)`` over the bins of a histogram, with p from the tokens seen lately and
q from calibration, in nats. Samples alone make it positive: with n and m tokens in B bins that hold
anything in calibration, by about ``(B - 1) / 2 (1 / n + 1 / m)``, which is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf import _core
from sedac_hf.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.calibration.traces import Traces
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["DriftMonitor", "RiskHistograms"]

FloatArray = npt.NDArray[np.float32]
Counts = npt.NDArray[np.float64]

BINS = 16
_PRIOR = 0.5
_NAMES = ("risks.edges", "risks.counts")


@dataclass(frozen=True)
class RiskHistograms:
    """Histogram of the risk at every checkpoint over calibration tokens.

    Attributes:
        edges: Edges of the bins at each checkpoint, not decreasing, float32 `[checkpoints, edges]`.
        counts: Tokens in each bin, int64 `[checkpoints, edges + 2]`; the last bin holds risks that
            were not finite.
    """

    edges: FloatArray
    counts: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        """Refuse what is no histogram.

        Raises:
            ConfigError: If shapes do not belong together, edges decrease or are not finite, or a
                checkpoint has no counts or negative ones.
        """
        shape = (len(self.edges), self.edges.shape[-1] + 2)
        if self.edges.ndim != 2 or self.counts.shape != shape:
            raise ConfigError(
                "risk histograms need edges [checkpoints, edges] and counts [checkpoints, edges + "
                f"2], found {self.edges.shape} and {self.counts.shape}."
            )
        if not np.isfinite(self.edges).all() or (np.diff(self.edges, axis=1) < 0).any():
            raise ConfigError("edges of risk histograms must be finite and not decrease.")
        if (self.counts < 0).any() or not (self.counts.sum(axis=1) > 0).all():
            raise ConfigError(
                "risk histograms need counts of at least 0, some at every checkpoint, found "
                f"{self.counts.sum(axis=1).tolist()} tokens."
            )

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints."""
        return len(self.edges)

    @classmethod
    def from_risks(cls, risks: FloatArray, bins: int = BINS) -> RiskHistograms:
        """Bins that hold equally many tokens each.

        Args:
            risks: Risks of calibration tokens, `[tokens, checkpoints]`.
            bins: Bins for finite risks.

        Raises:
            CalibrationError: If a checkpoint has no finite risk.
        """
        risks = np.asarray(risks, np.float32)
        finite = [column[np.isfinite(column)] for column in risks.T]
        if not finite or not all(len(column) for column in finite):
            raise CalibrationError(
                "a histogram of risks needs a finite risk at every checkpoint; found "
                f"{[len(column) for column in finite]} in {len(risks)} tokens."
            )
        shares = np.arange(1, bins) / bins
        edges = np.stack([np.quantile(column, shares) for column in finite]).astype(np.float32)
        # Where many risks are equal, edges are too: their empty bins say nothing and do no harm.
        edges = np.maximum.accumulate(edges, axis=1)
        counts = [
            _core.histogram(np.ascontiguousarray(column), edge)
            for column, edge in zip(risks.T, edges, strict=True)
        ]
        return cls(edges, np.stack(counts))

    @classmethod
    def from_traces(cls, traces: Traces) -> RiskHistograms:
        """Histograms of the tokens that may leave.

        Args:
            traces: Traces of calibration documents.
        """
        return cls.from_risks(traces.risk[traces.eligible])

    @classmethod
    def measure(
        cls, model: SedacForCausalLM, documents: Sequence[Document], *, progress: bool = False
    ) -> RiskHistograms:
        """Histograms for a model whose artefact has none.

        Args:
            model: A wrapped model with exit heads.
            documents: Documents like those that it was calibrated on.
            progress: Show a progress bar.
        """
        from sedac_hf.calibration.recalibration import trace_documents

        return cls.from_traces(trace_documents(model, documents, progress=progress))

    def to_tensors(self) -> dict[str, Tensor]:
        """As the tensors `risks.edges` and `risks.counts`."""
        edges = torch.from_numpy(self.edges.copy())
        return dict(zip(_NAMES, (edges, torch.from_numpy(self.counts.copy())), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], checkpoints: int) -> RiskHistograms:
        """Inverse of `to_tensors`.

        Args:
            tensors: The two tensors, and no others.
            checkpoints: How many checkpoints there must be.

        Raises:
            ConfigError: If one is missing or of another type, or they make no histograms.
        """
        if sorted(tensors) != sorted(_NAMES):
            raise ConfigError(f"risk histograms are {list(_NAMES)}, found {sorted(tensors)}.")
        edges, counts = (tensors[name] for name in _NAMES)
        if edges.dtype != torch.float32 or counts.dtype != torch.int64:
            raise ConfigError(
                "risk histograms need edges in float32 and counts in int64, found "
                f"{edges.dtype} and {counts.dtype}."
            )
        found = cls(edges.cpu().numpy().copy(), counts.cpu().numpy().copy())
        if found.num_checkpoints != checkpoints:
            raise ConfigError(
                f"risk histograms are of {found.num_checkpoints} checkpoints, the model has "
                f"{checkpoints}."
            )
        return found


class DriftMonitor:
    """Histograms of the risks seen lately, older tokens counting less and less.

    Not safe for several threads at once: whoever holds it locks.
    """

    def __init__(
        self, reference: RiskHistograms, *, memory: int = 1024, least: int | None = None
    ) -> None:
        """Begin with nothing seen.

        Args:
            reference: Histograms of calibration.
            memory: After so many tokens what was seen counts 1/e.
            least: Tokens from which there is an opinion; a quarter of `memory` when None.
        """
        self.reference = reference
        self._memory = memory
        self._least = memory / 4 if least is None else least
        self._live: Counts = np.zeros(reference.counts.shape)
        self._squares = np.zeros(reference.num_checkpoints)

    def observe(self, k: int, risks: FloatArray, weight: float = 1.0) -> None:
        """Take note of the risks of some tokens.

        Args:
            k: At which checkpoint.
            risks: Risks `[tokens]`; NaN and infinite ones count as such.
            weight: Tokens that each stands for.
        """
        if not len(risks):
            return
        keep = float(np.exp(-len(risks) * weight / self._memory))
        fresh = _core.histogram(np.ascontiguousarray(risks, np.float32), self.reference.edges[k])
        self._live[k] = keep * self._live[k] + weight * fresh
        self._squares[k] = keep**2 * self._squares[k] + weight**2 * len(risks)

    def tokens(self, k: int) -> float:
        """Tokens that what is remembered at checkpoint `k` is worth, `(sum w)^2 / sum w^2`."""
        squares = float(self._squares[k])
        return float(self._live[k].sum()) ** 2 / squares if squares > 0 else 0.0

    def drift(self, k: int) -> float | None:
        """Divergence from calibration at checkpoint `k` in nats; None without enough tokens."""
        live, reference = self.tokens(k), self.reference.counts[k]
        if live < self._least:
            return None
        used = int(np.count_nonzero(reference))
        found = _core.kl_divergence(self._live[k], reference.astype(np.float64), _PRIOR)
        return max(0.0, found - (used - 1) / 2 * (1 / live + 1 / float(reference.sum())))

    def to_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON values."""
        return {"counts": self._live.tolist(), "squares": self._squares.tolist()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave.

        Args:
            values: The record.

        Raises:
            CalibrationError: If it is of other histograms, or holds what no count can be.
        """
        live = np.asarray(values["counts"], np.float64)
        squares = np.asarray(values["squares"], np.float64)
        if live.shape != self._live.shape or squares.shape != self._squares.shape:
            raise CalibrationError(
                f"the counts of risks have shape {live.shape}, expected {self._live.shape}"
            )
        for array in (live, squares):
            if not (np.isfinite(array) & (array >= 0)).all():
                raise CalibrationError("the counts of risks must be finite and at least 0")
        self._live, self._squares = live, squares
