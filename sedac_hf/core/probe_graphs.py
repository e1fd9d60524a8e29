"""Probes of a fixed batch as CUDA graphs: one launch each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sedac_hf.errors import ConfigError

__all__ = ["ProbeGraphs"]


class ProbeGraphs:
    """One captured graph for each probe, for states of one shape, type and device.

    A graph reads the probe's weights where they were at capture: after they were moved or replaced
    it must be captured again. New values written in place are seen.
    """

    def __init__(
        self,
        probes: Sequence[Callable[[Tensor], Tensor]],
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Capture the graphs.

        Args:
            probes: Functions from states ``[rows, width]`` to risks ``[rows]``.
            rows: Rows of the batch.
            width: Width of the states.
            dtype: Type of the states.
            device: A CUDA device; the probes' weights must be on it.

        Raises:
            ConfigError: If the device is no CUDA device, or there is none.
        """
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError(
                f"CUDA graphs need a CUDA device; the probes are on {str(device)!r}. Move the "
                "model there first, or do without: probes on other devices need no graphs."
            )
        if rows < 1:
            raise ConfigError(f"a batch needs at least one row, found {rows}")
        self._lock = threading.Lock()
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._graphs: list[torch.cuda.CUDAGraph] = []
        for probe in probes:
            states = torch.zeros(rows, width, dtype=dtype, device=device)
            with torch.no_grad():
                # Libraries set themselves up at the first calls, which must not be captured.
                side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(3):
                        probe(states)
                torch.cuda.current_stream(device).wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    risks = probe(states)
            self._inputs.append(states)
            self._outputs.append(risks)
            self._graphs.append(graph)

    def serves(self, hidden: Tensor) -> bool:
        """Whether states have the shape, type and device that the graphs were captured for."""
        if not self._inputs:
            return False
        own = self._inputs[0]
        return (
            hidden.shape == own.shape and hidden.dtype == own.dtype and hidden.device == own.device
        )

    def risk(self, checkpoint: int, hidden: Tensor) -> Tensor:
        """Risk of states at a checkpoint.

        Args:
            checkpoint: Which checkpoint, counted from 0.
            hidden: States that the graphs serve, ``[rows, width]``.

        Returns:
            Risks, ``[rows]``, float32.
        """
        with self._lock:
            self._inputs[checkpoint].copy_(hidden)
            self._graphs[checkpoint].replay()
            return self._outputs[checkpoint].clone()
