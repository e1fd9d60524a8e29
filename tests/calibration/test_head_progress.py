"""An interrupted training of a head goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf.calibration import head_training
from sedac_hf.calibration.head_progress import HeadProgress, HeadProgressFile
from sedac_hf.calibration.head_schedule import HeadReport, HeadSchedule
from sedac_hf.calibration.states import BaseStates
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.exit_heads import ExitHead, build_exit_head
from sedac_hf.errors import CalibrationError
from tests.calibration.test_head_training import VOCABULARY
from tests.calibration.test_head_training import recorded as recorded

# Nothing is drawn at random but the order of documents, and the clock plays no part.
SCHEDULE = HeadSchedule(seconds=1e9, epochs=1.5, batch_tokens=512)


def train(recorded: tuple[BaseShell, BaseStates], head: ExitHead, **options: Any) -> HeadReport:
    shell, states = recorded
    return head_training.train_head(
        head, shell, states, range(80), [100], torch.arange(VOCABULARY), SCHEDULE,
        progress=False, **options,
    )  # fmt: skip


def test_an_interrupted_training_ends_as_one_that_was_not(
    recorded: tuple[BaseShell, BaseStates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, _ = recorded
    whole, parted, resumed = (build_exit_head(CheckpointSpec(1), shell) for _ in range(3))
    expected = train(recorded, whole)
    assert expected.steps > 12
    kept = HeadProgressFile(tmp_path / "head.training", SCHEDULE.seed, every=0.0)
    steps, run = [0], head_training.exit_states

    def counted(*values: Any, **named: Any) -> Any:
        steps[0] += named.get("mixed", False)
        if steps[0] == 8:
            raise KeyboardInterrupt
        return run(*values, **named)

    monkeypatch.setattr(head_training, "exit_states", counted)
    with pytest.raises(KeyboardInterrupt):
        train(recorded, parted, kept=kept)
    steps[0] = 100
    report = train(recorded, resumed, kept=kept)
    assert steps[0] == 100 + expected.steps - 7
    assert (report.steps, report.tokens) == (expected.steps, expected.tokens)
    assert report.loss == pytest.approx(expected.loss, rel=1e-4)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_the_progress_of_another_training_is_not_taken_up(
    recorded: tuple[BaseShell, BaseStates], tmp_path: Path
) -> None:
    shell, _ = recorded
    head = build_exit_head(CheckpointSpec(1), shell)
    optimiser = torch.optim.AdamW(head.parameters())
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    progress, path = HeadProgress([2.0, 1.5], 700, 3.25), tmp_path / "head.training"
    HeadProgressFile(path, seed=3).save(head, optimiser, progress)
    fresh = build_exit_head(CheckpointSpec(1), shell)
    before = [each.clone() for each in fresh.parameters()]
    other = torch.optim.AdamW(fresh.parameters())
    assert HeadProgressFile(path, seed=4).load(fresh, other) == HeadProgress()
    assert all(map(torch.equal, before, fresh.parameters()))
    assert not other.state
    assert HeadProgressFile(path, seed=3).load(fresh, other) == progress
    for one, two in zip(head.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimiser.state[one].keys() == other.state[two].keys()
        assert all(torch.equal(optimiser.state[one][k], v) for k, v in other.state[two].items())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CalibrationError, match=r"head\.training does not hold"):
        HeadProgressFile(path, seed=3).load(fresh, other)
