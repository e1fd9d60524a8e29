"""Quality and speed of strategies, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sedac_hf.calibration import channel_order
from sedac_hf.cli import app
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.perplexity import paired_perplexity
from sedac_hf.evaluation.strategies import operating_points, strategy_curves
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import load_base, save_base, wrap_base
from tests.micro_exits import micro_documents, micro_exits
from tests.micro_model import NUM_LAYERS, MicroModel
from tests.tiny_models import LAYERS

POINTS = ((0.2, 10.0, 0.5), (0.7, 10.0, 0.5), (0.7, 10.0, 0.4))


@pytest.fixture(scope="module")
def micro(micro_model: MicroModel) -> SedacForCausalLM:
    model = micro_exits(micro_model)
    texts = micro_documents(micro_model.language, 20, seed=3)
    model.set_channel_order(channel_order(model.base, texts))
    return model


def test_points_have_the_same_sure_tokens_and_skip_different_things(
    micro_model: MicroModel, micro: SedacForCausalLM
) -> None:
    texts = micro_documents(micro_model.language, 20, seed=4)
    points = operating_points(micro, texts, POINTS)
    names = [point.name for point in points]
    assert names == [
        "own rules", "hard 20%", "hard 70%", "soft 20% k=10 from 0.5", "soft 70% k=10 from 0.5",
        "soft 70% k=10 from 0.4",
        "adaptive-soft 20% k=10 from 0.5", "adaptive-soft 70% k=10 from 0.5",
        "adaptive-soft 70% k=10 from 0.4",
    ]  # fmt: skip
    found = {p.name: paired_perplexity(micro, texts, cascade=p.cascade) for p in points}
    for name, quality in found.items():
        if "soft" in name:
            assert quality.soft_exit_share == pytest.approx(
                float(name.split("%")[0][-2:]) / 100, abs=0.06
            )
            assert quality.exit_share == 0
            assert quality.mean_depth == NUM_LAYERS
            assert quality.mean_kept_share < 1
        else:
            assert quality.mean_kept_share == 1
            assert quality.soft_exit_share == 0
    kept = {name: quality.mean_kept_share for name, quality in found.items()}
    assert kept["soft 70% k=10 from 0.4"] > kept["soft 70% k=10 from 0.5"]
    assert kept["soft 20% k=10 from 0.5"] > kept["soft 70% k=10 from 0.5"]
    # What is left out costs more the more it is.
    rises = {name: quality.ppl_increase for name, quality in found.items()}
    assert rises["soft 70% k=10 from 0.4"] < rises["soft 70% k=10 from 0.5"]


def test_curves_hold_quality_and_speed_of_one_run(
    micro_model: MicroModel, micro: SedacForCausalLM
) -> None:
    texts = micro_documents(micro_model.language, 12, seed=4)
    points = operating_points(micro, texts[:4], POINTS[:1])
    told: list[str] = []
    report = strategy_curves(
        micro, texts[4:], points, max_new_tokens=4, rounds=1, max_prompts=2, told=told.append
    )
    assert [row["strategy"] for row in report["points"]] == [
        "hard", "hard", "soft", "adaptive-soft",
    ]  # fmt: skip
    for row, point in zip(report["points"], points, strict=True):
        expected = paired_perplexity(micro, texts[4:], cascade=point.cascade)
        assert row["ppl_increase"] == pytest.approx(expected.ppl_increase, abs=1e-9)
        low, high = row["ppl_increase_ci95"]
        assert low <= row["ppl_increase"] <= high
        assert row["speed_vs_plain"]["median"] > 0
        assert row["exit_share"] == pytest.approx(expected.exit_share + expected.soft_exit_share)
    assert micro.exit_stats.tokens == 0  # measuring leaves the model's own figures alone
    assert len(told) == len(points) + 2
    untimed = strategy_curves(micro, texts[4:], points[:1], speed=False)
    assert untimed["points"][0]["speed_vs_plain"] is None


def test_thresholds_need_decode_steps(micro_model: MicroModel, micro: SedacForCausalLM) -> None:
    with pytest.raises(CalibrationError, match="decode step"):
        operating_points(micro, [])


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    base = save_base(tmp_path / "base")
    model = wrap_base(load_base(base), base_model_name_or_path=str(base))
    model.save_pretrained(tmp_path / "artefact")
    return tmp_path / "artefact"


def test_the_command_prints_one_row_for_each_point(artefact: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    words = [" ".join(f"w{(i * j) % 90 + 4:02d}" for i in range(1, 20)) for j in range(1, 9)]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    asked = [
        "eval", str(artefact), "--strategies", "--data", str(texts), "--documents", "6",
        "--max-new-tokens", "3", "--rounds", "1", "--prompts", "1", "--dtype", "float32",
        "--output", str(tmp_path / "report.json"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*asked, "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["depth"] == LAYERS
    assert report["channel_order"] == "measured for this"
    assert {row["strategy"] for row in report["points"]} == {"hard", "soft", "adaptive-soft"}
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["points"] == report["points"]
    shown = CliRunner().invoke(app, [*asked, "--no-speed"])
    assert shown.exit_code == 0, shown.output
    assert "adaptive-soft 60% k=10 from 0.2" in shown.output
    assert "no order of channels" in shown.output


def test_the_command_refuses_what_it_cannot_measure(artefact: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(artefact), "--strategies", "--mode", "exact"])
    assert result.exit_code == 2
    assert "certified mode" in result.output
