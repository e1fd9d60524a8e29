"""On a CUDA device off, plain and exact mode write what the base writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf import SedacForCausalLM
from sedac_hf.evaluation.agreement import base_logits, divergences
from tests.cuda.device import (
    DEVICE,
    GREEDY,
    LONG,
    ROWS,
    micro_batch,
    micro_prompts,
    moved,
    needs_device,
    on,
)
from tests.generation.drafting import knowing, padded
from tests.micro_model import MicroModel
from tests.wrapping import wrap

pytestmark = needs_device
KINDS = {0: "feedback", 2: "block"}
# On a device the base's static cache would have its forward compiled, which takes minutes.
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": STATIC}


@torch.no_grad()
def test_off_is_the_base_bit_for_bit(base: PreTrainedModel) -> None:
    given = on(padded(4), DEVICE)
    model = wrap(base, KINDS)
    expected, found = base(**given).logits, model(**given, exits="off").logits
    assert found.device.type == DEVICE.type
    assert torch.equal(found, expected)
    for name, cache in CACHES.items():
        tokens = base.generate(**given, **GREEDY, **cache)
        again = model.generate(**given, **GREEDY, **cache, sedac_mode="off")
        assert torch.equal(again, tokens), name
    assert model.exit_stats.tokens == 0


@pytest.mark.parametrize("rows", ROWS)
def test_plain_is_the_base(base: PreTrainedModel, rows: int) -> None:
    given = on(padded(rows), DEVICE)
    model = wrap(base, KINDS)
    for name, cache in CACHES.items():
        expected = base.generate(**given, **GREEDY, **cache)
        found = model.generate(**given, **GREEDY, **cache, sedac_mode="plain")
        assert torch.equal(found, expected), name
    assert model.exit_stats.exit_share == 0


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.usefixtures("eager")
def test_exact_is_the_base_whatever_heads_say(base: PreTrainedModel, cache: str, rows: int) -> None:
    given = on(padded(rows), DEVICE)
    model = wrap(base, KINDS)
    expected = base.generate(**given, **GREEDY, **CACHES[cache])
    found = model.generate(**given, **GREEDY, **CACHES[cache], sedac_mode="exact")
    assert torch.equal(found, expected)
    drafts = model.exit_stats.drafts.to_dict()
    assert drafts["reason_without_drafts"] == ""
    assert drafts["offered"] > 0
    stats = model.exit_stats
    assert stats.runs_on == "modules"
    assert ("SEDAC_PASS" if DEVICE.type == "cpu" else DEVICE.type) in stats.runs_on_reason


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("eager")
def test_drafts_of_heads_that_know_the_base_are_accepted(base: PreTrainedModel, rows: int) -> None:
    given = on(padded(rows), DEVICE)
    model = knowing(base)
    expected = base.generate(**given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY, sedac_mode="exact"), expected)
    drafts = model.exit_stats.drafts.to_dict()
    assert drafts["accepted_by_source"]["head"] > 0
    assert drafts["tokens_per_pass"] > 1.2


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("governor", ["always drafts", "by the clock"])
def test_exact_is_the_base_where_exits_work(
    micro_model: MicroModel,
    exiting: SedacForCausalLM,
    rows: int,
    governor: str,
    request: pytest.FixtureRequest,
) -> None:
    if governor == "always drafts":
        request.getfixturevalue("eager")
    given = on(micro_prompts(micro_model, rows), DEVICE)
    model = moved(exiting)
    expected = model.base.generate(**given, **LONG)
    for _ in range(2):  # the second call goes by what the first has measured
        assert torch.equal(model.generate(**given, **LONG, sedac_mode="exact"), expected)
    drafts = model.exit_stats.drafts.to_dict()
    assert drafts["passes"] > 0
    if governor == "always drafts":
        assert drafts["accepted_by_source"]["head"] > 0


@pytest.mark.usefixtures("eager")
def test_a_seed_gives_its_text_again_and_that_of_the_base(base: PreTrainedModel) -> None:
    given = on(padded(2), DEVICE)
    model = knowing(base, 0.1)
    values = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(**given, **values, sedac_mode="exact"))
    torch.manual_seed(1)
    expected = base.generate(**given, **values)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0], expected)
    assert model.exit_stats.drafts.to_dict()["offered"] > 0


@pytest.mark.usefixtures("eager")
def test_in_bfloat16_exact_parts_from_plain_in_ties_only(
    micro_model: MicroModel, exiting: SedacForCausalLM
) -> None:
    model = copy.deepcopy(exiting).to(DEVICE, torch.bfloat16)
    apart = []
    for seed in (92, 93):
        batch = micro_batch(micro_model, 4, seed)
        given = on({"input_ids": batch.ids, "attention_mask": batch.mask}, DEVICE)
        plain, exact = (
            model.generate(**given, **LONG, sedac_mode=mode) for mode in ("plain", "exact")
        )
        apart += divergences(batch, exact, plain, base_logits(model))
    assert [each for each in apart if not each.units <= 2] == []
    assert model.exit_stats.drafts.to_dict()["accepted_by_source"]["head"] > 0
