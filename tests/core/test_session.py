"""Sessions belong to one call; totals add up under threads."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest

from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.core.session import ExitSession, StepRecord, active_session, session_scope


def test_a_session_is_seen_by_its_owner_in_its_thread_only() -> None:
    owner, other = object(), object()
    session = ExitSession(owner=owner, mode="certified")
    elsewhere: list[object] = []
    with session_scope(session):
        assert active_session(owner) is session
        assert active_session(other) is None
        inner = ExitSession(owner=other, mode="plain")
        with session_scope(inner):
            assert active_session(owner) is None
            assert active_session(other) is inner
        assert active_session(owner) is session
        thread = threading.Thread(target=lambda: elsewhere.append(active_session(owner)))
        thread.start()
        thread.join()
    assert elsewhere == [None]
    assert active_session(owner) is None


def test_a_session_ends_with_an_error() -> None:
    owner = object()
    with pytest.raises(RuntimeError), session_scope(ExitSession(owner=owner, mode="plain")):
        raise RuntimeError
    assert active_session(owner) is None


def test_a_step_without_a_record_counts_as_full_depth() -> None:
    session = ExitSession(owner=None, mode="certified")
    session.pending = StepRecord.full_depth(2, 6, 1)
    session.pending.layers[0] = 3
    assert session.commit(2, 6, 1).layers.tolist() == [3, 6]
    assert session.pending is None
    assert session.commit(2, 6, 1).layers.tolist() == [6, 6]
    # A record of another number of rows is of another forward, such as one for guidance.
    session.pending = StepRecord.full_depth(4, 6, 1)
    assert session.commit(2, 6, 1).layers.tolist() == [6, 6]
    assert [len(record.layers) for record in session.records] == [2, 2, 2]


def test_observers_are_told_of_every_step_and_of_the_end() -> None:
    class Observer:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def observe(self, record: StepRecord, live: np.ndarray | None) -> None:
            self.seen.append((record, None if live is None else live.tolist()))

        def end(self) -> None:
            self.seen.append("end")

    observer = Observer()
    session = ExitSession(owner=None, mode="certified", observers=(observer,))
    with session_scope(session):
        session.commit(2, 6, 1)
        session.commit(2, 6, 1, np.array([True, False]))
    first, second = session.records
    assert observer.seen == [(first, None), (second, [True, False]), "end"]


def test_a_record_tells_the_last_risk_that_is_known() -> None:
    record = StepRecord.full_depth(3, 6, 2)
    record.risks[:] = [[0.5, np.nan], [0.7, 0.2], [np.nan, np.nan]]
    record.confidences[:] = [[0.1, np.nan], [0.2, 0.9], [np.nan, np.nan]]
    np.testing.assert_array_equal(record.risk, np.array([0.5, 0.2, np.nan], np.float32))
    np.testing.assert_array_equal(record.confidence, np.array([0.1, 0.9, np.nan], np.float32))


def test_totals_add_up_under_threads() -> None:
    stats = ExitStats(8, [1, 4])
    layers = np.array([1, 4, 8, 8])
    tries = np.array([[True, False], [True, True], [False, True], [False, False]])

    def work() -> None:
        for _ in range(200):
            stats.add(layers, tries)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.tokens == 3200
    assert stats.exits_by_layer == {1: 800, 4: 800}
    assert stats.tries_by_layer == {1: 1600, 4: 1600}
    assert stats.exit_share == 0.5
    assert stats.mean_depth == (2 + 5 + 8 + 8) / 4
    assert str(stats) == (
        "3200 tokens, 50.0% left early, mean depth 5.8 of 8 layers, exits by layer {1: 800, 4: 800}"
    )


def test_totals_survive_pickling() -> None:
    stats = ExitStats(4, [1])
    stats.add(np.array([1]), np.array([[True]]))
    again = pickle.loads(pickle.dumps(stats))
    again.add(np.array([4]), np.array([[False]]))
    assert again.to_dict()["exit_share"] == 0.5
    assert stats.tokens == 1


def test_the_embedding_counts_as_no_layer() -> None:
    stats = ExitStats(4, [-1])
    stats.add(np.array([-1, 4]), np.array([[True], [False]]))
    assert stats.mean_depth == 2.0
