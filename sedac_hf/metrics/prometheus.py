"""A collector's figures in Prometheus' format, and a server for them.

`prometheus_client` (the extra `metrics`) is imported at first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from sedac_hf.errors import ConfigError, MissingExtraError
from sedac_hf.metrics.call_meter import MODES, SOURCES
from sedac_hf.metrics.histogram import size

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from sedac_hf._core import HistogramCounts, MetricsCounts
    from sedac_hf.metrics.collector import SEDACMetricsCollector

__all__ = ["MetricsServer", "exposition", "registry_of", "serve_metrics"]

_FULL = "full"  # label of tokens that left nowhere


def _client(module: str = "") -> Any:
    try:
        return import_module(f"prometheus_client{module}")
    except ImportError as error:
        raise MissingExtraError(
            "Metrics in Prometheus' format need the package prometheus_client, which is not "
            "installed: pip install sedac-hf[metrics]."
        ) from error


def exposition(collector: SEDACMetricsCollector) -> str:
    """All figures in the text format.

    Args:
        collector: The collector.

    Raises:
        MissingExtraError: If `prometheus_client` is not installed.
    """
    text: bytes = _client().generate_latest(registry_of(collector))
    return text.decode()


def registry_of(collector: SEDACMetricsCollector) -> CollectorRegistry:
    """A registry that holds this collector and nothing else.

    Args:
        collector: The collector.

    Raises:
        MissingExtraError: If `prometheus_client` is not installed.
    """
    registry: CollectorRegistry = _client().CollectorRegistry(auto_describe=False)
    registry.register(_Families(collector))
    return registry


class MetricsServer:
    """Serves `/metrics` from a thread until it is closed; a `with` block closes it.

    Attributes:
        host: Address that it listens on.
        port: Its port.
    """

    def __init__(self, collector: SEDACMetricsCollector, port: int, host: str) -> None:
        """Listen; see `serve_metrics`."""
        start = _client().start_http_server
        if not 0 <= port <= 65535:
            raise ConfigError(f"port must be 0 (any that is free) to 65535, found {port}.")
        try:
            self._server, self._thread = start(port, host, registry=registry_of(collector))
        except OSError as error:
            reason = f"metrics cannot be served on {host}, port {port}: {error.strerror or error}"
            raise OSError(error.errno, f"{reason}. Name another port, or 0 for any") from error
        self.host = host
        self.port = int(self._server.server_port)

    @property
    def url(self) -> str:
        """Where the figures are."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving; once is enough, more does no harm."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        """Serve inside the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop serving."""
        self.close()


def serve_metrics(
    collector: SEDACMetricsCollector, port: int = 9109, host: str = "127.0.0.1"
) -> MetricsServer:
    """Serve a collector's figures over HTTP, from a thread of their own.

    Args:
        collector: The collector.
        port: Port to listen on; 0 takes one that is free.
        host: Address to listen on: this machine's own by default, `"0.0.0.0"` for every network.

    Returns:
        The server; close it, or use it as a `with` block.

    Raises:
        ConfigError: If the port is no port.
        OSError: If it cannot be listened on.
        MissingExtraError: If `prometheus_client` is not installed.
    """
    return MetricsServer(collector, port, host)


class _Families:
    """Makes metric families of a snapshot whenever somebody asks."""

    def __init__(self, collector: SEDACMetricsCollector) -> None:
        self._collector = collector
        core = _client(".metrics_core")
        self._counter, self._gauge = core.CounterMetricFamily, core.GaugeMetricFamily
        self._histogram, self._summary = core.HistogramMetricFamily, core.SummaryMetricFamily
        self._number = _client(".utils").floatToGoString

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        found = self._collector.snapshot()
        yield from self._tokens(found)
        yield from self._layers(found)
        yield from self._times(found)
        yield from self._reports(found)

    def _counts(
        self, name: str, text: str, label: str, values: Sequence[tuple[str, int]]
    ) -> Metric:
        family: Metric = self._counter(name, text, labels=[label])
        for which, value in values:
            cast(Any, family).add_metric([which], value)
        return family

    def _single(self, name: str, text: str, value: int) -> Metric:
        family: Metric = self._counter(name, text, value=value)
        return family

    def _add(self, family: Any, labels: list[str], found: HistogramCounts, kind: str) -> None:
        buckets, below = [], 0
        bounds = [*(self._number(bound) for bound in self._collector.bounds[kind]), "+Inf"]
        for bound, count in zip(bounds, found["counts"], strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric(labels, buckets=buckets, sum_value=found["sum"])

    def _tokens(self, found: MetricsCounts) -> Iterator[Metric]:
        modes = list(zip(MODES, found["tokens"], strict=True))
        yield self._counts("sedac_tokens", "Tokens generated.", "mode", modes)
        left = [(str(each["layer"]), each["exits"]) for each in found["layers"]]
        yield self._counts(
            "sedac_tokens_by_layer",
            "Tokens by the layer after which they left; full: all layers.",
            "layer",
            [*left, (_FULL, found["full"])],
        )
        sources = list(zip(SOURCES, found["sources"], strict=True))
        yield self._counts(
            "sedac_tokens_by_source",
            "Tokens by who had drafted them: an exit head, the text, or the base alone.",
            "source",
            sources,
        )
        yield self._single("sedac_verifications", "Passes that verified drafts.", found["passes"])
        yield self._single("sedac_drafts", "Drafts that were verified.", found["drafts"])

    def _layers(self, found: MetricsCounts) -> Iterator[Metric]:
        layers = found["layers"]
        names = [str(each["layer"]) for each in layers]
        told = [each["decisions"] for each in layers]
        text = "Tokens that came to a checkpoint."
        yield self._counts("sedac_decisions", text, "layer", list(zip(names, told, strict=True)))
        tries = [each["tries"] for each in layers]
        text = "Tokens whose exit was tried there."
        yield self._counts("sedac_tries", text, "layer", list(zip(names, tries, strict=True)))
        broken = [each["risk"]["not_finite"] for each in layers]
        text = "Risks that were NaN or infinite; such a token does not leave."
        pairs = list(zip(names, broken, strict=True))
        yield self._counts("sedac_risk_not_finite", text, "layer", pairs)
        risk = self._histogram("sedac_risk", "Risk at a checkpoint.", labels=["layer"])
        sure = self._histogram("sedac_confidence", "Confidence there, 0 to 1.", labels=["layer"])
        bar = self._gauge("sedac_threshold", "Threshold of the last decision.", labels=["layer"])
        skipped = self._summary(
            "sedac_soft_exit_ratio", "Share of later layers that an exit skipped.", labels=["layer"]
        )
        for name, each in zip(names, layers, strict=True):
            self._add(risk, [name], each["risk"], "risk")
            self._add(sure, [name], each["confidence"], "confidence")
            skipped.add_metric([name], count_value=each["exits"], sum_value=each["skipped"])
            if each["decisions"]:
                bar.add_metric([name], each["threshold"])
        yield from (risk, sure, bar, skipped)

    def _times(self, found: MetricsCounts) -> Iterator[Metric]:
        text = "Seconds that a token took, first tokens apart, by the layer it left after."
        tokens = self._histogram("sedac_token_seconds", text, labels=["layer"])
        for each in found["layers"]:
            self._add(tokens, [str(each["layer"])], each["seconds"], "token")
        self._add(tokens, [_FULL], found["full_seconds"], "token")
        text = "Seconds to the first token."
        first = self._histogram("sedac_first_token_seconds", text, labels=[])
        self._add(first, [], found["first_seconds"], "call")
        calls = self._histogram("sedac_call_seconds", "Seconds of a call.", labels=["mode"])
        for mode, histogram in zip(MODES, found["calls"], strict=True):
            if size(histogram):
                self._add(calls, [mode], histogram, "call")
        yield from (tokens, first, calls)

    def _reports(self, found: MetricsCounts) -> Iterator[Metric]:
        events = list(found["occurrences"].items())
        yield self._counts("sedac_events", "What happened now and then.", "event", events)
        text = "Tokens, decisions and calls that were reported."
        yield self._single("sedac_reports", text, found["sent"])
        text = "Those of them that a full queue refused."
        yield self._single("sedac_reports_dropped", text, found["dropped"])
        text = "Those of them that are not counted yet."
        yield self._gauge("sedac_reports_waiting", text, value=found["waiting"])
