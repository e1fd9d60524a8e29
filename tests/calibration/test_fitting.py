"""`fit` from end to end on the micro model, whose exits really work."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf.calibration.documents import append_documents
from sedac_hf.calibration.fit_settings import FitReport, FitSettings, default_checkpoints
from sedac_hf.calibration.fit_splits import split_for_fit
from sedac_hf.calibration.fit_stages import FitRun
from sedac_hf.calibration.fitting import fit
from sedac_hf.calibration.head_progress import HeadProgressFile
from sedac_hf.calibration.head_schedule import HeadReport
from sedac_hf.calibration.head_training import train_head
from sedac_hf.calibration.pareto import Policy
from sedac_hf.calibration.workspace import Workspace
from sedac_hf.config import CheckpointSpec
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.ablation import fitted_variants
from sedac_hf.modeling import SedacForCausalLM
from tests.micro_exits import micro_documents
from tests.micro_model import MicroModel

SETTINGS = FitSettings(
    checkpoints=(CheckpointSpec(1), CheckpointSpec(3)),
    budget_seconds=600.0,
    draft_words=48,
    probe_rank=8,
    costs="parameters",  # on so small a model no exit saves time
    epochs=10.0,
    learning_rate=3e-3,
    epsilon=0.06,
)


def micro_texts(micro: MicroModel, count: int) -> list[str]:
    """Texts in the micro model's language that it was not trained on."""
    documents = micro.language.documents(count, seed=77)
    return [micro.language.text(document) for document in documents]


@pytest.fixture(scope="module")
def fitted(
    micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SedacForCausalLM, FitReport]:
    """An artefact fitted on texts of the micro language."""
    output = tmp_path_factory.mktemp("fit") / "artefact"
    model, report = fit(
        micro_model.model,
        micro_texts(micro_model, 450),
        tokenizer=micro_model.tokenizer,
        output_dir=output,
        settings=SETTINGS,
        progress=False,
    )
    return output, model, report


def test_heads_learn_and_gates_tell_easy_from_hard(
    fitted: tuple[Path, SedacForCausalLM, FitReport],
) -> None:
    _, _, report = fitted
    assert [head.layer_idx for head in report.heads] == [1, 3]
    # Free words have one sure winner in no distribution: agreement is bounded by the language.
    assert report.heads[-1].agreement > 0.6
    assert report.heads[-1].agreement >= report.heads[0].agreement - 0.05
    assert {gate.gate for gate in report.gates} >= {
        "entropy", "divergence", "probability", "static risk", "static",
    }  # fmt: skip
    best = max(gate.auroc for gate in report.gates)
    assert best > 0.75


def test_parts_of_the_gates_are_judged_and_those_that_pay_are_used(
    fitted: tuple[Path, SedacForCausalLM, FitReport], micro_model: MicroModel
) -> None:
    output, model, report = fitted
    asked = {(r.layer_idx, r.gate, r.modality) for r in report.modalities}
    for layer in (1, 3):
        assert {(layer, "risk", "consistency"), (layer, "sureness", "entropy")} <= asked
        assert {(layer, "risk", "attention"), (layer, "sureness", "attention")} <= asked
    for each in report.modalities:
        assert each.kept == (each.worth > each.cost)
    rows = {row["name"]: row for row in report.ablation}
    assert {"entropy alone", "entropy alone, decay on"} & rows.keys()
    chosen = [row for row in rows.values() if row["chosen"]]
    assert len(chosen) == 1
    assert ({"fused", "gated"} <= rows.keys()) == (model.gates.fusion is not None)
    may = any(each.kept for each in report.modalities)
    judged = {
        n: row["judged_cost"] for n, row in rows.items() if may or n not in ("fused", "gated")
    }
    assert all(chosen[0]["judged_cost"] <= cost + 0.002 for cost in judged.values())
    if model.cascade is not None:
        options = Policy.from_dict(chosen[0]["policy"]).cascade
        for name in ("fusion", "adaptive_decay", "routes"):
            assert getattr(model.cascade, name) == getattr(options, name)
    again = SedacForCausalLM.from_pretrained(output, base_model=micro_model.model)
    assert [row.name for row in fitted_variants(again)] == list(rows)
    assert again.gates.to_tensors().keys() == model.gates.to_tensors().keys()
    card = (output / "README.md").read_text()
    assert "Variants of the gates" in card
    assert "| entropy alone |" in card
    assert "| 1 | risk | attention |" in card


def test_what_is_deployed_is_what_the_certificate_says(
    fitted: tuple[Path, SedacForCausalLM, FitReport], micro_model: MicroModel
) -> None:
    output, model, report = fitted
    assert report.certificate is not None
    assert (model.cascade is None) == (report.certificate["accepted"] == 0)
    again = SedacForCausalLM.from_pretrained(output, base_model=micro_model.model)
    assert again.cascade == model.cascade
    assert (model.config.mode, again.config.mode) == ("exact", "exact")
    ids = torch.tensor([d.ids[:20] for d in micro_model.language.documents(4, seed=6)])
    runs = [
        m.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0) for m in (model, again)
    ]
    assert torch.equal(runs[0], runs[1])


def test_an_interrupted_fit_goes_on_and_ends_the_same(
    fitted: tuple[Path, SedacForCausalLM, FitReport],
    micro_model: MicroModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, model, _ = fitted

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished head was trained again")

    monkeypatch.setattr("sedac_hf.calibration.head_stage.train_head", forbidden)
    again, _ = fit(
        micro_model.model,
        micro_texts(micro_model, 450),
        tokenizer=micro_model.tokenizer,
        output_dir=output,
        settings=SETTINGS,
        progress=False,
    )
    assert again.cascade == model.cascade


def test_another_run_does_not_take_over_a_working_folder(
    fitted: tuple[Path, SedacForCausalLM, FitReport], micro_model: MicroModel
) -> None:
    output, _, _ = fitted
    with pytest.raises(CalibrationError, match="seed"):
        fit(
            micro_model.model,
            micro_texts(micro_model, 450),
            tokenizer=micro_model.tokenizer,
            output_dir=output,
            settings=FitSettings(**{**SETTINGS.__dict__, "seed": 1}),
            progress=False,
        )


def test_too_few_texts_are_refused(micro_model: MicroModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least 40"):
        fit(
            micro_model.model,
            micro_texts(micro_model, 5),
            tokenizer=micro_model.tokenizer,
            output_dir=tmp_path / "artefact",
            settings=SETTINGS,
            progress=False,
        )


def test_default_checkpoints_are_shallow_and_leave_something_to_skip() -> None:
    assert [spec.layer_idx for spec in default_checkpoints(30)] == [-1, 4]
    assert [spec.layer_idx for spec in default_checkpoints(2)] == [-1, 0]
    with pytest.raises(CalibrationError, match="nothing to skip"):
        default_checkpoints(1)


def test_a_fit_interrupted_while_a_head_trains_loses_nothing(
    micro_model: MicroModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(SETTINGS, checkpoints=(CheckpointSpec(1),), epochs=1.0)
    given = {"tokenizer": micro_model.tokenizer, "output_dir": tmp_path / "a", "progress": False}
    texts, save, saved = micro_texts(micro_model, 200), HeadProgressFile.save, [0]
    monkeypatch.setattr(HeadProgressFile.__init__, "__defaults__", (0.0,))

    def interrupted(self: HeadProgressFile, *values: Any) -> None:
        save(self, *values)
        saved[0] += 1
        if saved[0] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(HeadProgressFile, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(micro_model.model, texts, settings=short, **given)
    assert list((tmp_path / "a.work").glob("*.training"))
    _, report = fit(micro_model.model, texts, settings=short, **given)
    assert saved[0] == report.heads[0].steps
    assert not list((tmp_path / "a.work").glob("*.training"))


def test_a_larger_budget_trains_heads_further(
    micro_model: MicroModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(SETTINGS, checkpoints=(CheckpointSpec(1),), epochs=1.0, budget_seconds=300.0)
    given = {"tokenizer": micro_model.tokenizer, "output_dir": tmp_path / "a", "progress": False}
    texts = micro_texts(micro_model, 200)
    _, first = fit(micro_model.model, texts, settings=short, **given)
    rates = []

    def noted(*values: Any, **named: Any) -> HeadReport:
        rates.append(values[6].learning_rate)
        return train_head(*values, **named)

    monkeypatch.setattr("sedac_hf.calibration.head_stage.train_head", noted)
    _, same = fit(micro_model.model, texts, settings=short, **given)
    assert (rates, same.heads) == ([], first.heads)
    _, more = fit(micro_model.model, texts, settings=replace(short, budget_seconds=301.0), **given)
    path = next((tmp_path / "a.work").glob("head-*.json"))
    values = json.loads(path.read_text())
    del values["budget_seconds"]  # as earlier versions left it
    path.write_text(json.dumps(values))
    workspace = Workspace(
        tmp_path / "a.work", json.loads((tmp_path / "a.work/settings.json").read_text())
    )
    assert workspace.has_head(short.checkpoints[0], 1e9)
    assert rates == [0.5 * SETTINGS.learning_rate]
    assert more.heads[0].tokens > 1.5 * first.heads[0].tokens
    assert more.heads[0].agreement > first.heads[0].agreement
    assert more.documents == first.documents


def test_no_text_is_added_once_others_have_been_dealt_out(
    micro_model: MicroModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later document would move others from training into the test."""
    fresh = iter(micro_documents(micro_model.language, 120, seed=5))

    def write(base: object, tokenizer: object, path: Path, **values: object) -> None:
        append_documents(path, list(islice(fresh, 40)))

    monkeypatch.setattr("sedac_hf.calibration.fit_stages.write_texts", write)

    def begun() -> FitRun:
        return FitRun(
            micro_model.model, micro_model.tokenizer, SETTINGS, tmp_path / "a", True, False,
            time.monotonic(),
        )  # fmt: skip

    assert len(begun().documents(None)) == 40
    run = begun()
    documents = run.documents(None)
    assert len(documents) == 80  # the interrupted stage goes on
    run.states(split_for_fit(documents, 0))
    # What several processes wrote is there for one.
    run.workspace.texts_path(0).rename(run.workspace.texts_path(1))
    assert {d.hash for d in begun().documents(None)} == {d.hash for d in documents}
