"""Two processes share a fit: each writes texts, records states and trains a head."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_processes_share_a_fit(tmp_path: Path) -> None:
    output = tmp_path / "artefact"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.calibration.fit_worker", str(output),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    work = output.with_name("artefact.work")
    for rank in range(2):
        assert (work / f"texts-{rank}.jsonl").stat().st_size > 0
        assert (work / "states" / f"done-{rank}-2").exists()
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    assert reports[0]["heads"] == reports[1]["heads"]
    assert [head["layer_idx"] for head in reports[0]["heads"]] == [0, 1]
    # What the main process does alone, it does with the threads of both.
    most = min(2, os.cpu_count() or 1)
    assert reports[0]["threads"] == {"heads": 1, "thresholds": most, "certificate": most}
    assert reports[1]["threads"] == {"heads": 1}
    assert (output / "sedac.safetensors").exists()
