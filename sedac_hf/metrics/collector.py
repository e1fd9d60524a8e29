"""SEDACMetricsCollector: what models do, token by token, added up beside the decode path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sedac_hf._core import AsyncBatchProcessor
from sedac_hf.errors import ConfigError
from sedac_hf.metrics.call_meter import MODES, CallMeter
from sedac_hf.metrics.histogram import mean, quantile, spread
from sedac_hf.metrics.prometheus import exposition

if TYPE_CHECKING:
    from sedac_hf._core import LayerCounts, MetricsCounts
    from sedac_hf.metrics.attachment import Attachment
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["SEDACMetricsCollector", "TokenDecision"]

# The softplus of a probe: typical risks lie below 2, untrained probes say up to 10.
_RISKS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
_CONFIDENCES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TOKEN_SECONDS: Final = (
    0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip
_CALL_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Reading waits this long for what was recorded before it.
_PATIENCE = 1.0


class TokenDecision(NamedTuple):
    """What one checkpoint said of one token.

    Attributes:
        token_id: The token that was chosen, -1 where it is not known.
        layer_idx: Layer of the checkpoint; the number of layers for a token that came to none.
        risk_score: Risk there, None at no checkpoint.
        threshold: Threshold there, None at no checkpoint.
        accumulated_confidence: Confidence there, None at no checkpoint.
        should_exit: Whether the token left there.
        soft_exit_ratio: Share of the layers behind it that was skipped; 1 for a hard exit.
        latency_ms: Time that the token took; None for one that went on from here, or is the first
            of its text.
    """

    token_id: int
    layer_idx: int
    risk_score: float | None
    threshold: float | None
    accumulated_confidence: float | None
    should_exit: bool
    soft_exit_ratio: float
    latency_ms: float | None


class SEDACMetricsCollector:
    """Counts tokens, decisions, risks, confidences and times, of one model or several.

    What is recorded goes through a bounded queue to a thread of the Rust core, which needs no
    interpreter. Recording never waits: what a full queue refuses is counted as dropped. All methods
    may be called from several threads. A forked child counts for itself, from nothing.
    """

    def __init__(
        self,
        layer_indices: Sequence[int],
        *,
        queue_size: int = 4096,
        log_size: int = 10_000,
        risk_bounds: Sequence[float] = _RISKS,
        confidence_bounds: Sequence[float] = _CONFIDENCES,
        token_seconds_bounds: Sequence[float] = _TOKEN_SECONDS,
        call_seconds_bounds: Sequence[float] = _CALL_SECONDS,
        linger: float = 0.05,
    ) -> None:
        """Start the worker.

        Args:
            layer_indices: Layers of the checkpoints to watch; -1 is the embedding.
            queue_size: Steps that may wait for the worker.
            log_size: Decisions that `token_decisions` remembers.
            risk_bounds: Upper bounds of the histogram of risks, ascending.
            confidence_bounds: The same for confidences.
            token_seconds_bounds: The same for seconds per token.
            call_seconds_bounds: The same for seconds per call and to the first token.
            linger: Seconds that the worker waits for more once something has come.

        Raises:
            ConfigError: If a layer comes twice, bounds do not ascend, or a size cannot be.
        """
        self.layer_indices = tuple(int(layer) for layer in layer_indices)
        self.bounds = {
            "risk": tuple(float(bound) for bound in risk_bounds),
            "confidence": tuple(float(bound) for bound in confidence_bounds),
            "token": tuple(float(bound) for bound in token_seconds_bounds),
            "call": tuple(float(bound) for bound in call_seconds_bounds),
        }
        if log_size < 0:
            raise ConfigError(f"log_size must be 0 or more, found {log_size}.")
        if queue_size < 1:
            raise ConfigError(f"queue_size must be 1 or more, found {queue_size}.")
        risk, confidence, token, call = (list(bounds) for bounds in self.bounds.values())
        try:
            self._processor = AsyncBatchProcessor(
                list(self.layer_indices),
                len(MODES),
                (risk, confidence, token, call),
                queue_size,
                log_size,
                linger,
            )
        except ValueError as error:
            raise ConfigError(f"the collector cannot be built: {error}.") from error

    @classmethod
    def for_model(cls, model: SedacForCausalLM, **settings: Any) -> SEDACMetricsCollector:
        """A collector that watches the checkpoints of a model; attach it to let it count.

        Args:
            model: The model.
            **settings: As for the constructor.
        """
        return cls([spec.layer_idx for spec in model.config.checkpoint_specs()], **settings)

    def attach(self, model: SedacForCausalLM) -> Attachment:
        """Count what `model` does from its next call on; see `SedacForCausalLM.attach_metrics`.

        Args:
            model: The model.

        Returns:
            The attachment: `detach()` ends it, and so does leaving it as a `with` block.

        Raises:
            ConfigError: If the model has a checkpoint that is not watched.
        """
        return model.attach_metrics(self)

    def record_token_decision(
        self,
        token_id: int,
        layer_idx: int,
        risk_score: float,
        threshold: float,
        accumulated_confidence: float,
        should_exit: bool,
        soft_exit_ratio: float = 1.0,
        latency_ms: float | None = None,
    ) -> bool:
        """Record what a checkpoint said of a token, from a loop of your own.

        Attached models record by themselves. The token counts among the decisions and exits of its
        layer; the count of generated tokens is that of attached models.

        Args:
            token_id: The token, -1 if it is not known.
            layer_idx: Layer of the checkpoint.
            risk_score: Risk.
            threshold: Threshold that the risk was held against.
            accumulated_confidence: Confidence so far, in [0, 1].
            should_exit: Whether the token leaves.
            soft_exit_ratio: Share of the layers behind it that it skips, in [0, 1].
            latency_ms: Time that it took, in milliseconds, if known.

        Returns:
            Whether there was room; what is refused is counted as dropped.

        Raises:
            ConfigError: If the layer is not watched.
        """
        if layer_idx not in self.layer_indices:
            raise ConfigError(
                f"layer_idx must be one of the layers that are watched, "
                f"{list(self.layer_indices)}, found {layer_idx}."
            )
        seconds = math.nan if latency_ms is None else latency_ms / 1000
        return self._processor.submit_decision(
            token_id, layer_idx, risk_score, threshold, accumulated_confidence, should_exit,
            soft_exit_ratio, seconds,
        )  # fmt: skip

    def record_event(self, name: str) -> bool:
        """Count something that happens now and then, such as a fallback to safe thresholds.

        Args:
            name: What it is; a few different names at most, for each is a series of its own.

        Returns:
            Whether there was room.
        """
        return self._processor.submit_occurrence(name)

    def meter(
        self, mode: str, depth: int, layers: Sequence[int], thresholds: Sequence[float]
    ) -> CallMeter:
        """What reports one call of a model to this collector.

        Args:
            mode: The call's mode.
            depth: Layers of the base.
            layers: Layer of each checkpoint.
            thresholds: Threshold of each; NaN where none acts.
        """
        return CallMeter(self._processor, MODES.index(mode), depth, layers, thresholds)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until what was recorded before is counted; False if it took longer.

        Args:
            timeout: Seconds to wait at most.
        """
        return self._processor.flush(timeout)

    def close(self) -> None:
        """Count what waits and end the worker; figures can still be read, nothing more is taken."""
        self._processor.close()

    def snapshot(self) -> MetricsCounts:
        """Everything that was counted, as plain values."""
        self._processor.flush(_PATIENCE)
        return self._processor.snapshot()

    def get_layer_analysis(self) -> dict[int, dict[str, Any]]:
        """Figures of each checkpoint, by layer, as JSON values; None where nothing is known yet.

        Returns:
            For each layer: `decisions`, `tries`, `exits`, `exit_rate` (of the decisions),
            `threshold` (the last one), mean, standard deviation, quantiles and histogram of risk
            and confidence, `mean_soft_exit_ratio` of the exits, and mean and quantiles of the
            milliseconds that tokens took which left there.
        """
        return {found["layer"]: self._analysis(found) for found in self.snapshot()["layers"]}

    def token_decisions(self, last: int | None = None) -> list[TokenDecision]:
        """The last decisions, oldest first, at most `log_size`.

        Args:
            last: How many at most; all that are remembered if None.
        """
        self._processor.flush(_PATIENCE)
        columns = [column.tolist() for column in self._processor.log()]
        if last is not None:
            columns = [column[max(len(column) - last, 0) :] for column in columns]
        return [
            TokenDecision(
                token, layer, _known(risk), _known(threshold), _known(confidence), exits, skipped,
                _milliseconds(_known(seconds)),
            )
            for token, layer, risk, threshold, confidence, exits, skipped, seconds
            in zip(*columns, strict=True)
        ]  # fmt: skip

    def export_prometheus_metrics(self) -> str:
        """All figures in Prometheus' text format.

        Raises:
            MissingExtraError: If `prometheus_client` is not installed.
        """
        return exposition(self)

    def _analysis(self, found: LayerCounts) -> dict[str, Any]:
        decisions, exits, seconds = found["decisions"], found["exits"], found["seconds"]
        bounds = self.bounds["token"]
        values: dict[str, Any] = {
            "decisions": decisions,
            "tries": found["tries"],
            "exits": exits,
            "exit_rate": exits / decisions if decisions else None,
            "threshold": _known(found["threshold"]),
            "mean_soft_exit_ratio": found["skipped"] / exits if exits else None,
            "mean_latency_ms": _milliseconds(mean(seconds)),
            "median_latency_ms": _milliseconds(quantile(seconds, bounds, 0.5)),
            "p99_latency_ms": _milliseconds(quantile(seconds, bounds, 0.99)),
        }
        for name, histogram in (("risk", found["risk"]), ("confidence", found["confidence"])):
            bounds = self.bounds[name]
            values |= {
                f"mean_{name}": mean(histogram),
                f"std_{name}": spread(histogram),
                f"{name}_quantiles": {
                    share: quantile(histogram, bounds, share) for share in (0.1, 0.5, 0.9)
                },
                f"{name}_histogram": {"bounds": list(bounds), "counts": histogram["counts"]},
                f"{name}_not_finite": histogram["not_finite"],
            }
        return values


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
