"""Attaching a collector to a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sedac_hf.errors import ConfigError
from sedac_hf.metrics.collector import SEDACMetricsCollector

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CascadeConfig
    from sedac_hf.metrics.call_meter import CallMeter

__all__ = ["Attachment", "Measured"]


class Measured:
    """The part of a model that calls are reported by.

    Attributes:
        metrics: The collector, or None.
    """

    # Transformers evaluates this annotation, so its name is imported for real.
    metrics: SEDACMetricsCollector | None = None

    def attach_metrics(self, collector: SEDACMetricsCollector) -> Attachment:
        """Let a collector count what the model does, from the next call on.

        A collector may be attached to several models; a model has one at a time, and a second one
        takes the place of the first. A copy or a saved model has none.

        Args:
            collector: The collector.

        Returns:
            The attachment: `detach()` ends it, and so does leaving it as a `with` block.

        Raises:
            ConfigError: If the model has a checkpoint that is not watched.
        """
        own: Any = self
        layers = [spec.layer_idx for spec in own.config.checkpoint_specs()]
        missing = sorted(set(layers) - set(collector.layer_indices))
        if missing:
            raise ConfigError(
                f"The collector watches layers {list(collector.layer_indices)}, but the model has "
                f"checkpoints after layers {layers}. Build it with "
                "SEDACMetricsCollector.for_model(model)."
            )
        return Attachment(self, collector)

    def _meter(self, mode: str, cascade: CascadeConfig | None) -> CallMeter | None:
        """What reports a call in this mode; None without a collector."""
        collector = self.metrics
        if collector is None:
            return None
        own: Any = self
        layers: Sequence[int] = [spec.layer_idx for spec in own.config.checkpoint_specs()]
        thresholds = [math.nan] * len(layers)
        if cascade is not None:
            thresholds = [rule.threshold for rule in cascade.layers]
        return collector.meter(mode, own.exit_stats.depth, layers, thresholds)


class Attachment:
    """A collector on a model, until it is detached."""

    def __init__(self, model: Measured, collector: SEDACMetricsCollector) -> None:
        """Attach; see `SedacForCausalLM.attach_metrics`."""
        self._model = model
        self._before = model.metrics
        self.collector = collector
        model.metrics = collector

    def detach(self) -> None:
        """Put back what was attached before; nothing happens where another has taken over since."""
        if self._model.metrics is self.collector:
            self._model.metrics = self._before

    def __enter__(self) -> SEDACMetricsCollector:
        """The collector."""
        return self.collector

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()
