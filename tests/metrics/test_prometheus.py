"""The text format, parsed by Prometheus' own parser, and the server, asked over HTTP."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

from sedac_hf.errors import ConfigError, MissingExtraError, SedacError
from sedac_hf.metrics import SEDACMetricsCollector, serve_metrics
from tests.metrics.records import record_of
from tests.metrics.scraping import parsed, scraped


@pytest.fixture
def collector() -> SEDACMetricsCollector:
    """A collector of one call of ten steps of two rows, and some decisions told by hand."""
    found = SEDACMetricsCollector([1, 4])
    meter = found.meter("certified", 6, [1], [0.5])
    for _ in range(10):
        meter.step(record_of(2), np.arange(2), np.ones(2, np.bool_))
    meter.gained([[5, 6, 7]], [[1, 2, 0]], drafts=8)
    meter.end()
    found.record_token_decision(3, 4, float("inf"), 2.0, 0.0, False, latency_ms=3.0)
    found.record_event("drift")
    return found


def test_all_figures_are_there_and_agree(collector: SEDACMetricsCollector) -> None:
    found = parsed(collector.export_prometheus_metrics())
    assert found["sedac_tokens_total", "certified"] == 23
    assert found["sedac_tokens_by_layer_total", "1"] == 20
    assert found["sedac_tokens_by_layer_total", "4"] == 0
    assert found["sedac_tokens_by_layer_total", "full"] == 3
    assert [found["sedac_tokens_by_source_total", one] for one in ("base", "head", "lookup")] == [
        21, 1, 1,
    ]  # fmt: skip
    assert (found["sedac_verifications_total",], found["sedac_drafts_total",]) == (1, 8)
    assert found["sedac_decisions_total", "1"] == found["sedac_tries_total", "1"] == 20
    assert found["sedac_risk_not_finite_total", "4"] == 1
    assert found["sedac_risk_count", "1"] == 20
    assert found["sedac_risk_sum", "1"] == 5.0
    assert found["sedac_confidence_count", "1"] == 20
    assert found["sedac_threshold", "1"] == 0.5
    assert found["sedac_threshold", "4"] == 2.0
    assert found["sedac_soft_exit_ratio_sum", "1"] == 20
    assert found["sedac_first_token_seconds_count",] == 2
    assert found["sedac_token_seconds_count", "1"] == 18
    assert found["sedac_token_seconds_count", "full"] == 3
    assert found["sedac_call_seconds_count", "certified"] == 1
    assert found["sedac_events_total", "drift"] == 1
    assert found["sedac_reports_total",] == 23 + 3
    assert found["sedac_reports_dropped_total",] == found["sedac_reports_waiting",] == 0


def test_buckets_are_cumulative_and_end_with_the_count(collector: SEDACMetricsCollector) -> None:
    found = parsed(collector.export_prometheus_metrics())
    buckets = [
        value
        for (name, *rest), value in found.items()
        if name == "sedac_risk_bucket" and rest[0] == "1"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["sedac_risk_count", "1"]
    assert found["sedac_risk_bucket", "1", "0.2"] == 0
    assert found["sedac_risk_bucket", "1", "0.3"] == 20


def test_two_collectors_do_not_meet(collector: SEDACMetricsCollector) -> None:
    other = SEDACMetricsCollector([9])
    assert 'layer="9"' not in collector.export_prometheus_metrics()
    assert parsed(other.export_prometheus_metrics())["sedac_tokens_total", "certified"] == 0


def test_a_server_answers_until_it_is_closed(collector: SEDACMetricsCollector) -> None:
    with serve_metrics(collector, 0) as server:
        assert server.port > 0
        assert scraped(server.url)["sedac_tokens_total", "certified"] == 23
        collector.meter("plain", 6, [], []).gained([[1]], [[0]])
        assert scraped(server.url)["sedac_tokens_total", "plain"] == 1
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=5)
    server.close()


def test_a_port_that_cannot_be_had_is_named(collector: SEDACMetricsCollector) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port}.*another port"):
            serve_metrics(collector, port)
    with pytest.raises(ConfigError, match="65536"):
        serve_metrics(collector, 65536)


def test_without_the_extra_it_says_what_to_install(
    collector: SEDACMetricsCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: Any = sys.modules
    monkeypatch.setitem(modules, "prometheus_client", None)
    for ask in (collector.export_prometheus_metrics, lambda: serve_metrics(collector, 0)):
        with pytest.raises(MissingExtraError, match=r"sedac-hf\[metrics\]") as caught:
            ask()
        assert isinstance(caught.value, SedacError)
    assert collector.get_layer_analysis()[1]["decisions"] == 20
