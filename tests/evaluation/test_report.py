from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sedac_hf.calibration.documents import Document
from sedac_hf.errors import CalibrationError, ModeError, SedacError
from sedac_hf.evaluation.perplexity import evaluate
from sedac_hf.evaluation.report import load_report, save_report
from tests.evaluation.wrapped import LAYERS, random_documents, wrapped_llama

KEYS = {
    "base_ppl",
    "sedac_ppl",
    "ppl_increase",
    "ppl_increase_ci95",
    "exit_share",
    "exits_by_layer",
    "mean_depth",
    "depth",
    "speed_vs_generate",
    "speed_vs_plain",
    "head_share",
    "certificate",
}


@pytest.fixture(scope="module")
def model():
    return wrapped_llama()


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    found = evaluate(model, random_documents(10), max_new_tokens=3, rounds=2, output=folder)
    return found, folder


def test_all_named_keys_are_there_and_plain(report):
    found, _ = report
    assert set(found) >= KEYS
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["depth"] == 4
    assert set(found["exits_by_layer"]) == {str(layer) for layer in LAYERS}
    assert found["speed_vs_generate"] == found["speed"]["ratios"]["generate"]["median"]
    low, high = found["ppl_increase_ci95"]
    assert low <= found["ppl_increase"] <= high


def test_conditions_and_every_document_are_recorded(report, model):
    found, _ = report
    assert found["mode"] == "certified"
    assert len(found["per_document"]) == 10
    assert found["config"]["dtype"] == "float32"
    assert [rule["layer_idx"] for rule in found["config"]["thresholds"]] == list(LAYERS)
    assert {"torch", "transformers", "python", "sedac_hf", "numpy"} == set(found["versions"])
    assert found["machine"]["threads"] == 1
    assert set(found["seeds"]) == {"bootstrap", "speed"}


def test_head_share_is_that_of_the_weights(report, model):
    found, _ = report
    head = model.base_lm.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.base_lm.model.layers.parameters())
    assert found["head_share"] == pytest.approx(head / (head + layers))


def test_the_file_is_the_report(report):
    found, folder = report
    assert load_report(folder) == found
    assert load_report(folder / "results.json") == found
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_speed_starts_from_prompts_or_the_beginning_of_texts(model):
    rng = np.random.default_rng(0)
    some = [
        Document(rng.integers(3, 90, size), prompt_length=prompt)
        for size, prompt in ((12, 5), (12, 0), (100, 0), (2, 0))
    ]
    found = evaluate(model, some, max_new_tokens=1, rounds=1)
    assert found["speed"]["prompt_lengths"] == [5, 6, 32, 1]


def test_exact_mode_has_the_perplexity_of_the_base(model):
    found = evaluate(model, random_documents(5), mode="exact", speed=False)
    assert found["ppl_increase"] == 0.0
    assert found["sedac_ppl"] == found["base_ppl"]
    assert found["exit_share"] == 0.0
    assert found["speed"] is found["speed_vs_plain"] is None


def test_refused_and_unknown_modes_are_errors(model):
    model.refused_modes["certified"] = "the base is another."
    try:
        with pytest.raises(ModeError, match="the base is another"):
            evaluate(model, random_documents(2), speed=False)
    finally:
        model.refused_modes.clear()
    with pytest.raises(ModeError, match="mode must be one of"):
        evaluate(model, random_documents(2), mode="fast", speed=False)


def test_exits_that_are_kept_off_are_not_measured(model):
    model.exits_off_reason = "no certificate comes with the artefact."
    try:
        found = evaluate(model, random_documents(5), speed=False)
    finally:
        model.exits_off_reason = None
    assert (found["exit_share"], found["ppl_increase"]) == (0.0, 0.0)


def test_texts_need_a_tokenizer(model):
    with pytest.raises(CalibrationError, match="no tokenizer"):
        evaluate(model, ["some text"], speed=False)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "deep" / "results.json"
    save_report({"report_version": 1, "x": math.inf, "y": [math.nan, 1.5]}, path)
    assert json.loads(path.read_text()) == {"report_version": 1, "x": None, "y": [None, 1.5]}


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    save_report({"report_version": 1, "x": 1}, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("sedac_hf.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_report({"report_version": 1, "x": 2}, path)
    assert load_report(path)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"report_version": 9}', "{}"])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(SedacError, match=r"results\.json"):
        load_report(path)
