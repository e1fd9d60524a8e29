"""Progress on a terminal and in a log."""

from __future__ import annotations

import sys

import pytest

from sedac_hf.calibration import progress
from sedac_hf.calibration.progress import progress_bar, say


def run(shown: bool = True) -> None:
    bar = progress_bar(40, "states", "tok", initial=10, shown=shown)
    for step in range(3):
        bar.set_postfix(loss=f"{step}", refresh=False)
        bar.update(10)
    bar.close()


def test_a_log_has_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    run()
    say("states: done in 0.1 min")
    found = capsys.readouterr().err
    assert "\r" not in found
    lines = found.splitlines()
    assert all(line.startswith("states:") for line in lines)
    assert "25%" in lines[0]
    assert "100%" in lines[-2]
    assert "loss=2" in lines[-2]
    assert lines[-1] == "states: done in 0.1 min"


def test_a_log_is_spared_what_comes_soon_after(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert len(capsys.readouterr().err.splitlines()) <= 2  # the beginning and the end


def test_a_terminal_has_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run()
    found = capsys.readouterr().err
    assert found.startswith("\rstates:")
    assert found.count("\n") == 1


def test_nothing_is_shown_to_whoever_asks_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(shown=False)
    assert capsys.readouterr().err == ""
