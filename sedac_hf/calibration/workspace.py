"""What `fit` keeps on disk between its stages, so that an interrupted run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from sedac_hf.calibration.costs import CostModel
from sedac_hf.calibration.documents import Document, append_documents, read_documents
from sedac_hf.calibration.fit_settings import FitReport
from sedac_hf.calibration.head_progress import HeadProgressFile
from sedac_hf.calibration.head_schedule import HeadReport
from sedac_hf.errors import CalibrationError
from sedac_hf.files import replacing, write_atomically

if TYPE_CHECKING:
    from sedac_hf.config import CheckpointSpec
    from sedac_hf.core.exit_heads import ExitHead


class Workspace:
    """A folder that belongs to one run of `fit`."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        """Open the folder, or refuse it when another run's settings are in it.

        Args:
            directory: The folder.
            settings: What the results depend on, as JSON values.

        Raises:
            CalibrationError: If the folder was begun with other settings.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "settings.json"
        settings = json.loads(json.dumps(settings))
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(
                key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key)
            )
            if differing:
                raise CalibrationError(
                    f"{directory} holds an unfinished fit with another "
                    f"{', '.join(differing)}; remove the folder, or fit into another one"
                )
            return
        # Several processes open the folder at once: none may see half a file.
        write_atomically(path, json.dumps(settings, indent=1))

    def texts_path(self, rank: int) -> Path:
        """File of the documents that one process writes."""
        return self.directory / f"texts-{rank}.jsonl"

    def text_files(self) -> list[Path]:
        """Files of all documents that were written, by however many processes."""
        return sorted(self.directory.glob("texts-*.jsonl"))

    @property
    def texts_are_final(self) -> bool:
        """Whether a later stage has begun, which goes by the documents that there are."""
        return (self.directory / "states" / "key.json").exists()

    def given_documents(self, make: Callable[[], list[Document]]) -> list[Document]:
        """Documents made from the user's texts; made once."""
        path = self.directory / "given.jsonl"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            append_documents(partial, make())
            partial.rename(path)
        return read_documents(path)

    def add_seconds(self, stage: str, seconds: float) -> dict[str, float]:
        """Add to the time of a stage, and return the times of all stages so far."""
        path = self.directory / "seconds.json"
        times: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        times[stage] = times.get(stage, 0.0) + seconds
        path.write_text(json.dumps(times), encoding="utf-8")
        return times

    def has_head(self, spec: CheckpointSpec, budget_seconds: float = 0.0) -> bool:
        """Whether the head of a checkpoint has been trained, under a budget as large as this."""
        path = self._head_path(spec).with_suffix(".json")
        if not path.exists():
            return False
        values = json.loads(path.read_text(encoding="utf-8"))
        # Where no budget was noted, as earlier versions did not, the head is taken as it is.
        return bool(values.get("budget_seconds", math.inf) >= budget_seconds)

    def load_head(self, head: ExitHead) -> HeadReport:
        """Put a trained head's weights in place."""
        path = self._head_path(head.spec)
        head.load_state_dict(load_file(path))
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        values.pop("budget_seconds", None)
        return HeadReport.from_dict(values)

    def save_head(self, head: ExitHead, report: HeadReport, budget_seconds: float) -> None:
        """Keep a trained head, and under which budget it was trained."""
        path = self._head_path(head.spec)
        tensors = {n: t.detach().cpu().contiguous() for n, t in head.state_dict().items()}
        with replacing(path) as draft:
            save_file(tensors, draft)
        values = asdict(report) | {"budget_seconds": budget_seconds}
        write_atomically(path.with_suffix(".json"), json.dumps(values))

    def head_progress(self, spec: CheckpointSpec, seed: int) -> HeadProgressFile:
        """Where the unfinished training of a head is kept."""
        return HeadProgressFile(self._head_path(spec).with_suffix(".training"), seed)

    def save_report(self, report: FitReport) -> None:
        """Keep what a finished run says, for the other processes."""
        write_atomically(self._report_path, json.dumps(report.to_dict()))

    def load_report(self) -> FitReport:
        """What the finished run said."""
        return FitReport.from_dict(json.loads(self._report_path.read_text(encoding="utf-8")))

    @property
    def _report_path(self) -> Path:
        return self.directory / "report.json"

    def draft_vocabulary(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The draft vocabulary; made once."""
        path = self.directory / "draft.safetensors"
        if not path.exists():
            save_file({"tokens": make()}, path)
        return load_file(path)["tokens"]

    def costs(self, make: Callable[[], CostModel]) -> CostModel:
        """What exits cost on this machine; measured once, so that a resumed run chooses alike."""
        path = self.directory / "costs.json"
        if not path.exists():
            path.write_text(json.dumps(make().to_dict()), encoding="utf-8")
        return CostModel.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def _head_path(self, spec: CheckpointSpec) -> Path:
        kind = "feedback" if spec.feedback else "plain"
        return self.directory / f"head-{spec.layer_idx}-{kind}.safetensors"
