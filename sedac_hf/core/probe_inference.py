"""Probes: the risk of letting a token leave, read from its hidden state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sedac_hf.core.compiled import Compiled
from sedac_hf.core.probe_graphs import ProbeGraphs
from sedac_hf.errors import ConfigError

__all__ = ["LREProbe", "PackedProbe", "ProbeManager"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackedProbe:
    """A probe's weights as float32 arrays, the form that the Rust core takes.

    Attributes:
        project: ``[rank, width]``.
        norm_weight: ``[rank]``.
        norm_bias: ``[rank]``.
        epsilon: Added to the variance by the layer norm.
        out_weight: ``[rank]``.
        out_bias: A scalar.
    """

    project: FloatArray
    norm_weight: FloatArray
    norm_bias: FloatArray
    epsilon: float
    out_weight: FloatArray
    out_bias: float


def _features(
    hidden: Tensor, project: Tensor, norm_weight: Tensor, norm_bias: Tensor, epsilon: float
) -> Tensor:
    """``LayerNorm(project(h))``."""
    low = nn.functional.linear(hidden.to(project.dtype), project)
    return nn.functional.layer_norm(low, low.shape[-1:], norm_weight, norm_bias, epsilon)


def _risk(
    hidden: Tensor,
    project: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """``softplus(out(LayerNorm(project(h))))``."""
    features = _features(hidden, project, norm_weight, norm_bias, epsilon)
    return nn.functional.softplus(nn.functional.linear(features, out_weight, out_bias).squeeze(-1))


_compiled_risk = Compiled(_risk)


class LREProbe(nn.Module):
    """Low-rank entropy probe: ``softplus(out(LayerNorm(project(h))))``, float32 throughout.

    The layer norm stands behind the projection, so the risk does not depend on the size of the
    state, which grows with depth.
    """

    def __init__(self, hidden_size: int, rank: int = 64) -> None:
        """Build a probe.

        Args:
            hidden_size: Width of the base's hidden states.
            rank: Rank of the projection.

        Raises:
            ConfigError: If a size is not positive.
        """
        super().__init__()
        if hidden_size < 1 or rank < 1:
            raise ConfigError(
                f"a probe needs a positive width and rank, found {hidden_size} and {rank}"
            )
        self.project = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
        self.norm = nn.LayerNorm(rank, dtype=torch.float32)
        self.out = nn.Linear(rank, 1, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Risk of each state.

        Args:
            hidden: States, ``[..., width]``, any floating dtype.

        Returns:
            Risks >= 0, ``[...]``, float32; lower is safer.
        """
        return _risk(hidden, *self._weights())

    def compiled(self, hidden: Tensor) -> Tensor:
        """The same by a compiled program, up to rounding; by `forward` where torch has none."""
        return _compiled_risk(hidden, *self._weights())

    def features(self, hidden: Tensor) -> Tensor:
        """What the probe sees of each state, ``[..., rank]``.

        Args:
            hidden: States, ``[..., width]``, any floating dtype.
        """
        return _features(hidden, *self._weights()[:4])

    def _weights(self) -> tuple[Any, ...]:
        norm = self.norm
        return (
            self.project.weight, norm.weight, norm.bias, norm.eps, self.out.weight, self.out.bias,
        )  # fmt: skip

    def packed(self) -> PackedProbe:
        """The weights as float32 arrays that share no memory with the probe."""

        def array(value: Tensor) -> FloatArray:
            return np.array(value.detach().float().cpu().numpy(), dtype=np.float32)

        return PackedProbe(
            project=array(self.project.weight),
            norm_weight=array(self.norm.weight),
            norm_bias=array(self.norm.bias),
            epsilon=self.norm.eps,
            out_weight=array(self.out.weight[0]),
            out_bias=float(self.out.bias.detach()),
        )


class ProbeManager(nn.Module):
    """The probes of all checkpoints, in the order of their layers."""

    def __init__(self, probes: Iterable[LREProbe]) -> None:
        """Hold the probes.

        Args:
            probes: One probe a checkpoint.
        """
        super().__init__()
        self.probes = nn.ModuleList(probes)
        self._graphs: ProbeGraphs | None = None

    @classmethod
    def build(cls, checkpoints: int, hidden_size: int, rank: int = 64) -> ProbeManager:
        """Untrained probes for `checkpoints` checkpoints."""
        return cls(LREProbe(hidden_size, rank) for _ in range(checkpoints))

    def __len__(self) -> int:
        """Number of checkpoints."""
        return len(self.probes)

    def risk(self, checkpoint: int, hidden: Tensor) -> Tensor:
        """Risk of states at a checkpoint.

        Args:
            checkpoint: Which checkpoint, counted from 0.
            hidden: States, ``[..., width]``.

        Returns:
            Risks, ``[...]``, float32.
        """
        probe = cast(LREProbe, self.probes[checkpoint])
        if hidden.device.type == "cpu" or torch.is_grad_enabled():
            return cast(Tensor, probe(hidden))
        if self._graphs is not None and self._graphs.serves(hidden):
            return self._graphs.risk(checkpoint, hidden)
        return probe.compiled(hidden)

    def setup_cuda_graph(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """Capture each probe as a CUDA graph for batches of one size.

        States of other sizes or types go through compiled probes as before. Moving the probes drops
        the graphs.

        Args:
            rows: Rows of the batch.
            dtype: Type of the base's hidden states.

        Raises:
            ConfigError: If the probes are not on a CUDA device, or `rows` is not positive.
        """
        probes = [cast(LREProbe, probe) for probe in self.probes]
        weight = probes[0].project.weight if probes else torch.empty(0)
        width = weight.shape[-1]
        self._graphs = ProbeGraphs(probes, rows, width, dtype, weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> ProbeManager:
        self._graphs = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave graphs out: they cannot be copied."""
        return {**self.__dict__, "_graphs": None}

    def native(self, checkpoint: int) -> PackedProbe:
        """The weights of one probe for the Rust core."""
        return cast(LREProbe, self.probes[checkpoint]).packed()
