"""The collector by itself: what is told comes back, nothing is lost, whatever the process does."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

from sedac_hf import config
from sedac_hf.errors import ConfigError
from sedac_hf.generation.draft_tree import NAMES
from sedac_hf.metrics import SEDACMetricsCollector, TokenDecision
from sedac_hf.metrics.call_meter import MODES, SOURCES
from tests.metrics.records import record_of


def tell(collector: SEDACMetricsCollector, token: int, layer: int = 7, **values: Any) -> bool:
    given: dict[str, Any] = {
        "risk_score": 0.25, "threshold": 1.0, "accumulated_confidence": 0.75,
        "should_exit": token % 2 == 0, "soft_exit_ratio": 0.5, "latency_ms": 20.0,
    }  # fmt: skip
    return collector.record_token_decision(token, layer, **(given | values))


def test_names_are_those_of_the_package() -> None:
    assert MODES == config.MODES
    assert [NAMES[place] for place in range(len(SOURCES))] == list(SOURCES)


def test_decisions_come_back_as_they_were_told() -> None:
    collector = SEDACMetricsCollector([7, 14, 21])
    tell(collector, 5, 14, risk_score=0.5, soft_exit_ratio=0.0)
    tell(collector, 6, 21, risk_score=math.nan, latency_ms=None)
    assert collector.token_decisions() == [
        TokenDecision(5, 14, 0.5, 1.0, 0.75, False, 0.0, 20.0),
        TokenDecision(6, 21, None, 1.0, 0.75, True, 0.5, None),
    ]


def test_layers_are_analysed_one_by_one() -> None:
    collector = SEDACMetricsCollector([7, 14, 21])
    for token, risk in enumerate([0.1, 0.3, 0.9, 2.7]):
        tell(collector, token, risk_score=risk)
    tell(collector, 9, 14, risk_score=math.inf)
    found = collector.get_layer_analysis()
    assert list(found) == [7, 14, 21]
    assert (found[7]["decisions"], found[7]["exits"], found[7]["exit_rate"]) == (4, 2, 0.5)
    assert found[7]["mean_risk"] == pytest.approx(1.0)
    assert found[7]["std_risk"] == pytest.approx(np.std([0.1, 0.3, 0.9, 2.7]), rel=1e-6)
    assert found[7]["risk_quantiles"][0.5] == pytest.approx(0.3)
    assert sum(found[7]["risk_histogram"]["counts"]) == 4
    assert found[7]["mean_confidence"] == pytest.approx(0.75)
    assert found[7]["mean_soft_exit_ratio"] == pytest.approx(0.5)
    assert found[7]["mean_latency_ms"] == pytest.approx(20.0)
    assert found[7]["threshold"] == 1.0
    assert (found[14]["risk_not_finite"], found[14]["mean_risk"]) == (1, None)
    assert found[21]["exit_rate"] is None
    assert found[21]["median_latency_ms"] is None


def test_a_quantile_lies_where_the_values_lie() -> None:
    collector = SEDACMetricsCollector([0], risk_bounds=np.linspace(0.01, 1, 100))
    values = np.random.default_rng(0).beta(2, 5, 4000)
    for value in values:
        assert tell(collector, 1, 0, risk_score=float(value))
    found = collector.get_layer_analysis()[0]["risk_quantiles"]
    for share, quantile in found.items():
        assert quantile == pytest.approx(float(np.quantile(values, share)), abs=0.011)


def test_the_log_is_bounded() -> None:
    collector = SEDACMetricsCollector([7], log_size=5)
    for token in range(100):
        assert tell(collector, token)
    assert [one.token_id for one in collector.token_decisions()] == [95, 96, 97, 98, 99]
    assert [one.token_id for one in collector.token_decisions(last=2)] == [98, 99]
    assert collector.get_layer_analysis()[7]["decisions"] == 100
    silent = SEDACMetricsCollector([7], log_size=0)
    tell(silent, 1)
    assert silent.token_decisions() == []
    assert silent.get_layer_analysis()[7]["decisions"] == 1


@pytest.mark.parametrize("queue_size", [2, 64, 100_000])
def test_nothing_is_lost_under_load_from_several_threads(queue_size: int) -> None:
    collector = SEDACMetricsCollector([7, 14], queue_size=queue_size, linger=0.001)
    accepted = [0] * 4

    def send(which: int) -> None:
        for token in range(5000):
            accepted[which] += tell(collector, token, 7 if which % 2 else 14)

    threads = [threading.Thread(target=send, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = collector.snapshot()
    assert found["sent"] == 20_000
    assert found["waiting"] == 0
    assert found["taken"] == sum(accepted)
    assert found["taken"] + found["dropped"] == found["sent"]
    assert sum(layer["decisions"] for layer in found["layers"]) == found["taken"]
    if queue_size == 100_000:
        assert found["dropped"] == 0


def test_a_full_queue_drops_whole_steps_and_counts_their_tokens() -> None:
    # The worker waits for more until half the queue is full: here nobody empties it meanwhile.
    collector = SEDACMetricsCollector([1], queue_size=9, linger=60.0)
    meter = collector.meter("certified", 6, [1], [0.5])
    rows, steps = 3, 200
    for _ in range(steps):
        meter.step(record_of(rows), np.arange(rows), np.array([True, False, True]))
    found = collector.snapshot()
    assert found["sent"] == 2 * steps
    assert found["tokens"][MODES.index("certified")] == found["taken"]
    assert found["taken"] + found["dropped"] == found["sent"]


def test_records_are_read_in_place_and_let_go() -> None:
    collector = SEDACMetricsCollector([1])
    meter = collector.meter("certified", 6, [1], [0.5])
    record = record_of(2)
    risks = weakref.ref(record.risks)
    meter.step(record, np.arange(2), np.ones(2, np.bool_))
    with pytest.raises(ValueError, match="read-only"):
        record.risks[0, 0] = 0.0
    del record
    assert risks() is not None  # the queue, or the log of what was processed, holds the only array
    collector.flush()
    gc.collect()
    assert risks() is None
    assert collector.get_layer_analysis()[1]["decisions"] == 2


def test_flush_and_close_can_be_called_again() -> None:
    collector = SEDACMetricsCollector([7], linger=60.0)
    tell(collector, 1)
    begun = time.monotonic()
    assert collector.flush(30.0)
    collector.close()
    collector.close()
    assert time.monotonic() - begun < 30.0
    assert not tell(collector, 2)
    found = collector.snapshot()
    assert (found["sent"], found["taken"], found["dropped"]) == (2, 1, 1)


def test_events_are_counted_by_name() -> None:
    collector = SEDACMetricsCollector([])
    for name in ("drift", "drift", "fallback"):
        collector.record_event(name)
    assert collector.snapshot()["occurrences"] == {"drift": 2, "fallback": 1}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer_indices": [3, 3]}, "another layer"),
        ({"queue_size": 0}, "queue_size"),
        ({"log_size": -1}, "log_size"),
        ({"risk_bounds": [1.0, 0.5]}, "above the one before"),
        ({"confidence_bounds": [math.nan]}, "finite"),
        ({"linger": -1.0}, "linger"),
    ],
)
def test_bad_settings_are_refused_at_construction(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SEDACMetricsCollector(**({"layer_indices": [7]} | values))


def test_a_layer_that_is_not_watched_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[7\], found 8"):
        tell(SEDACMetricsCollector([7]), 1, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_counts_for_itself_and_the_parent_goes_on() -> None:
    collector = SEDACMetricsCollector([7], linger=0.0)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            tell(collector, 1)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                # A child that hangs would hang the test: this ends it.
                signal.alarm(20)
                for token in range(50):
                    tell(collector, token)
                sound = collector.flush(10.0)
                found = collector.snapshot()
                layer = found["layers"][0]["decisions"]
                right = (found["sent"], found["taken"], layer) == (50, 50, 50)
                os._exit(0 if sound and right else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
    before = collector.snapshot()["sent"]
    tell(collector, 1)
    found = collector.snapshot()
    assert found["sent"] == before + 1
    assert found["taken"] + found["dropped"] == found["sent"]


SCRIPT = """
import threading, numpy as np
from sedac_hf.metrics import SEDACMetricsCollector
collector = SEDACMetricsCollector([7], linger={linger})
def send():
    while True:
        collector.record_token_decision(1, 7, 0.5, 1.0, 0.5, True)
for _ in range(2):
    threading.Thread(target=send, daemon=True).start()
meter = collector.meter("plain", 6, [], [])
for _ in range(200):
    meter.gained([[1, 2]], [[0, 1]])
print("told", flush=True)
{ending}
"""


@pytest.mark.parametrize("linger", [0.0, 60.0])
@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "del collector"])
def test_the_interpreter_ends_with_a_live_worker(linger: float, ending: str) -> None:
    code = SCRIPT.format(linger=linger, ending=ending)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def test_importing_the_package_brings_nothing_along() -> None:
    code = (
        "import sys, sedac_hf\n"
        "light = {'prometheus_client', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "import sedac_hf.metrics\n"
        "sedac_hf.metrics.SEDACMetricsCollector([1]).get_layer_analysis()\n"
        "late = {'prometheus_client', 'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not light and not late, (light, late)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
