"""`sedac eval --ablation`: what each part of the gates is worth, in one table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf.calibration.pareto import Policy
from sedac_hf.core.cascade_config import CascadeConfig
from sedac_hf.evaluation.perplexity import paired_perplexity
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import load_base, make_tokenizer, save_base
from tests.cli_command import call as sedac
from tests.core.gated import PARTS, gated_model

OPTIONS = ("--documents", 8, "--max-new-tokens", 4, "--rounds", 1, "--prompts", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("ablation") / "base")


@pytest.fixture(scope="module")
def texts(base: Path) -> Path:
    """Eight documents with prompts, as JSON lines."""
    drawn = torch.randint(4, 60, (8, 24), generator=torch.Generator().manual_seed(1))
    path = base.parent / "texts.jsonl"
    words = [[f"w{i:02d}" for i in row] for row in drawn.tolist()]
    lines = [{"prompt": " ".join(w[:6]), "completion": " ".join(w[6:])} for w in words]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture(scope="module")
def artefact(base: Path) -> Path:
    """An artefact with the variants that a fit would have left."""
    some = torch.randint(4, 60, (4, 24), generator=torch.Generator().manual_seed(2))
    model = gated_model(
        load_base(base), {}, some, base_model_name_or_path=str(base), kv_mode="settle"
    )
    rows = [{"name": "entropy alone", "judged_cost": 0.9, "chosen": True,
             "policy": as_policy(model.cascade)}]  # fmt: skip
    for name, options in PARTS.items():
        cascade = CascadeConfig.from_tensors(
            replace(model.cascade, **options).to_tensors(), model.cascade.layer_indices
        )
        policy = as_policy(cascade) if name != "gated" else None
        rows.append({"name": name, "judged_cost": 1.0, "chosen": False, "policy": policy})
    folder = base.parent / "artefact"
    model.save_pretrained(folder, tokenizer=make_tokenizer(), results={"fit": {"ablation": rows}})
    return folder


def as_policy(cascade: CascadeConfig) -> dict[str, Any]:
    return Policy(cascade, 0.004, 0.2, 0.9).to_dict()


def test_every_variant_is_a_row_with_its_own_figures(
    artefact: Path, base: Path, texts: Path
) -> None:
    result = sedac("eval", artefact, "--ablation", "--data", texts, *OPTIONS, "--json", "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    rows = {row["name"]: row for row in values["rows"]}
    assert list(rows) == ["entropy alone", *PARTS]
    assert [name for name, row in rows.items() if row["chosen"]] == ["entropy alone"]
    for name, row in rows.items():
        low, high = row["ppl_increase_ci95"]
        assert low <= row["ppl_increase"] <= high
        assert (row["speed_vs_plain"] is None) == (name == "gated")
    assert rows["gated"]["exit_share"] == 0
    assert rows["gated"]["mean_depth"] == values["depth"]
    assert len({row["exit_share"] for row in rows.values()}) > 3
    # A row is what the variant's own rules do.
    model = SedacForCausalLM.from_pretrained(artefact, mode="certified")
    alone = paired_perplexity(model, documents_of(texts), cascade=replace(
        model.cascade, **PARTS["static"]))  # fmt: skip
    assert rows["static"]["ppl_increase"] == pytest.approx(alone.ppl_increase, abs=1e-7)
    assert rows["static"]["exit_share"] == alone.exit_share


def documents_of(texts: Path) -> list[Any]:
    """The documents as the command reads them."""
    from sedac_hf.cli_load import Loaded, load
    from sedac_hf.cli_support import Screen
    from sedac_hf.cli_texts import documents_for

    screen = Screen(quiet=True, as_json=True)
    loaded: Loaded = load(
        str(texts.parent / "artefact"), base=None, mode="certified", device="cpu",
        dtype="auto", screen=screen,
    )  # fmt: skip
    return list(documents_for(loaded, str(texts), 8, seed=0, screen=screen)[0])


def test_the_table_names_what_fit_chose(artefact: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    options = ("--data", texts, "--no-speed", "--documents", 4, "-o", output)
    result = sedac("eval", artefact, "--ablation", *options)
    assert result.exit_code == 0
    assert "entropy alone *" in result.stdout
    assert "routes" in result.stdout
    assert len(json.loads(output.read_text())["rows"]) == 1 + len(PARTS)


def test_an_artefact_without_variants_is_told_apart(base: Path, texts: Path) -> None:
    some = torch.randint(4, 60, (4, 24))
    model = gated_model(load_base(base), {}, some, base_model_name_or_path=str(base))
    model.save_pretrained(base.parent / "bare", tokenizer=make_tokenizer())
    result = sedac("eval", base.parent / "bare", "--ablation", "--data", texts)
    assert result.exit_code == 2
    assert "Fit it anew" in result.output
    result = sedac("eval", base.parent / "bare", "--ablation", "--mode", "exact")
    assert result.exit_code == 2
    assert "no other mode" in result.output


def test_two_reports_at_once_are_refused(tmp_path: Path) -> None:
    result = sedac("eval", tmp_path, "--ablation", "--strategies")
    assert result.exit_code == 2
    assert "one at a time" in result.output
