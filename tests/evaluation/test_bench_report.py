from __future__ import annotations

import json
import os
import re
import subprocess
from types import SimpleNamespace

import pytest

from sedac_hf.evaluation import environment
from sedac_hf.evaluation.arms import make_batches
from sedac_hf.evaluation.bench import BenchResult
from sedac_hf.evaluation.bench_budget import Budget
from sedac_hf.evaluation.bench_plan import BenchPlan
from sedac_hf.evaluation.bench_report import bench_report, save_bench
from tests.wrapping import wrap


@pytest.fixture
def report(llama):
    """A report with one row that holds a number that is not finite."""
    row = {"mode": "plain", "vs_generate": float("inf"), "vs_generate_ci95": (1.0, 2.0)}
    return bench_report(wrap(llama), "here/my-sedac", BenchPlan(), BenchResult([row], ["a"], None))


def test_conditions_say_what_a_reader_needs_to_repeat_it(report):
    found = report["conditions"]
    for name in ("date", "model", "dtype", "threads", "versions", "machine", "plan"):
        assert found[name] not in (None, ""), name
    assert found["dtype"] == "float32"
    assert found["plan"]["tokens"] == BenchPlan().tokens
    assert found["left_out"] == ["a"]
    assert found["commit"] == BenchResult().commit
    assert report["rows"] == [
        {"mode": "plain", "vs_generate": None, "vs_generate_ci95": [1.0, 2.0]}
    ]


def test_results_are_kept_by_date_model_and_data_type(report, tmp_path):
    path = save_bench(report, tmp_path / "a" / "b")
    assert re.fullmatch(r"\d{8}T\d{6}-my-sedac-float32\.json", path.name)
    assert json.loads(path.read_text()) == report


def test_a_result_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    first = save_bench(report, tmp_path)
    before = first.read_text()

    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        save_bench({**report, "rows": []}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert first.read_text() == before


# ----------------------------------------------------------------------------------------- commit


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_package_and_says_when_files_were_changed(tmp_path, monkeypatch):
    file = tmp_path / "sedac_hf" / "evaluation" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1\n")
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    monkeypatch.setattr(environment, "__file__", str(file))
    assert environment.commit() is None
    git(tmp_path, "init", "-q")
    # A package that was installed into somebody's repository is not at its commit.
    assert environment.commit() is None
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "a")
    clean = environment.commit()
    assert re.fullmatch(r"[0-9a-f]{40}", str(clean))
    file.write_text("a = 2\n")
    assert environment.commit() == f"{clean}-dirty"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None


# ----------------------------------------------------------------------------------------- budget


def cells(*sizes):
    """Cells of some batches of one row each."""
    return [make_batches([[5, 6, 7]] * size, 1, pad=0) for size in sizes]


def test_without_a_limit_everything_is_affordable():
    budget = Budget(BenchPlan())
    budget.expect(1e9)
    assert budget.affordable(cells(4, 4)) == 4


def test_time_is_dealt_by_work_and_learned_from_what_a_cell_took(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("sedac_hf.evaluation.bench_budget.time", clock)
    budget = Budget(BenchPlan(seconds=100.0, quick=True))
    same = cells(4, 4)
    assert budget.affordable(same) == 4  # nothing is known yet
    budget.learn(49.0, same[0])
    assert budget.affordable(same) == 4
    budget.learn(75.0, same[0])
    assert budget.affordable(same) == 2  # half of the time, half of the work
    now[0] = 60.0
    assert budget.affordable(same[1:]) == 2
    now[0] = 99.0
    assert budget.affordable(same[1:]) == 0


def test_rows_on_the_modules_are_work_too():
    plan, (batches,) = BenchPlan(quick=True, modes=("exact", "certified")), cells(4)
    alone, both = (Budget(plan, native=native)._work(batches) for native in (False, True))
    # generate, plain, two modes, lookup and early exit (as much as four); then two more.
    assert both / alone == pytest.approx((9 + 2) / 9)
