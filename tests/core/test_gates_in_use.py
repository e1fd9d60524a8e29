"""Fusion, routing and adaptive decay where they act: in `generate`, and in its simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sedac_hf.core.cascade_config import CascadeConfig
from sedac_hf.core.cascade_options import AdaptiveDecay, ClassRule
from sedac_hf.core.gate_parts import GateParts
from sedac_hf.errors import ConfigError
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import save_base
from tests.core.gated import PARTS, ROUTES, gated_model
from tests.micro_model import MicroModel
from tests.tiny_models import VOCABULARY, build_tiny
from tests.wrapping import wrap

NEW = 14
GREEDY = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_logits": True, "sedac_mode": "certified",
}  # fmt: skip


def texts(rows=4, length=20, seed=3, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (rows, length), generator=generator)


def left(output):
    return output.exit_layers[:, 1:]


@pytest.mark.parametrize("kv_mode", ["propagate", "settle"])
@pytest.mark.parametrize("name", PARTS)
def test_generation_is_the_simulation_token_for_token(micro_model: MicroModel, name, kv_mode):
    base = micro_model.model
    some = torch.tensor([d.ids for d in micro_model.language.documents(6, seed=1)])
    model = gated_model(base, PARTS[name], some, sure=0.3, share=0.7, kv_mode=kv_mode)
    start = 9
    # What is drawn varies more than what is most probable under heads that were never trained.
    torch.manual_seed(5)
    sampled = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 0}
    output = model.generate(some[:4, :start], **sampled)
    found = model(output.sequences, use_cache=False, exits="simulate", exit_start=start)
    depths = left(output)
    assert len(set(depths.flatten().tolist())) == 3  # both checkpoints and the full depth
    assert torch.equal(found.exit_layers[:, start:-1], depths)
    said = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(found.logits[:, start - 1 : -1], said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["block", "feedback"])
def test_heads_with_a_cache_of_their_own_agree_too(kind):
    ids = texts(3)
    model = gated_model(
        build_tiny("llama"), PARTS["all"], ids, {-1: kind, 1: kind}, sure=0.2, kv_mode="settle"
    )
    output = model.generate(ids[:, :6], **GREEDY)
    found = model(output.sequences, use_cache=False, exits="simulate", exit_start=6)
    assert len(set(left(output).flatten().tolist())) > 1
    assert torch.equal(found.exit_layers[:, 6:-1], left(output))


@pytest.mark.parametrize("name", PARTS)
def test_every_part_changes_who_leaves(name):
    ids = texts()
    options = PARTS[name]
    model = gated_model(build_tiny("llama"), options, ids, share=0.6)
    plain = CascadeConfig(model.cascade.layers)
    with_part = model(ids, use_cache=False, exits="simulate").exit_layers
    with model.cascade_replaced(plain):
        without = model(ids, use_cache=False, exits="simulate").exit_layers
    assert not torch.equal(with_part, without)


def test_everything_off_decides_bit_for_bit_as_without_the_parts():
    ids = texts()
    with_parts = gated_model(build_tiny("llama"), {}, ids, sure=0.3)
    plain = wrap(build_tiny("llama"), {0: "lens", 2: "lens"}, with_parts.cascade.layers,
                 probe_rank=8)  # fmt: skip
    assert with_parts.gates.fusion is not None
    one, other = (m.generate(ids[:, :8], **GREEDY) for m in (with_parts, plain))
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.exit_layers, other.exit_layers)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    found, expected = (m(ids, use_cache=False, exits="simulate") for m in (with_parts, plain))
    for name in ("risks", "confidences", "probabilities", "exit_layers", "logits"):
        assert torch.equal(
            getattr(found, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1)
        )


@pytest.mark.parametrize("kv_mode", ["propagate", "settle"])
@pytest.mark.parametrize("name", PARTS)
def test_a_row_does_what_it_does_alone(name, kv_mode):
    ids = texts(4, 9)
    model = gated_model(build_tiny("llama"), PARTS[name], texts(), sure=0.2, kv_mode=kv_mode)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, start in enumerate((0, 3, 0, 0)):
        alone = model.generate(ids[row : row + 1, start:], **GREEDY)
        assert torch.equal(left(alone)[0], left(together)[row])
        assert torch.equal(alone.sequences[0, 9 - start :], together.sequences[row, 9:])


@pytest.mark.parametrize("name", PARTS)
def test_saved_and_loaded_it_leaves_at_the_same_places(tmp_path: Path, name):
    base = save_base(tmp_path / "base")
    from tests.artefacts import load_base

    ids = texts()
    model = gated_model(
        load_base(base), PARTS[name], ids, sure=0.3, base_model_name_or_path=str(base)
    )
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "artefact")
    again = SedacForCausalLM.from_pretrained(tmp_path / "artefact", mode="certified")
    again.set_cascade(again.cascade)
    assert again.cascade == CascadeConfig.from_tensors(
        model.cascade.to_tensors(), model.cascade.layer_indices
    )
    one, other = (m.generate(ids[:, :8], **GREEDY) for m in (model, again))
    assert torch.equal(one.exit_layers, other.exit_layers)
    assert torch.equal(one.sequences, other.sequences)
    assert int((left(one) < 4).sum()) > 0


def test_a_plain_artefact_holds_no_trace_of_the_parts():
    model = wrap(build_tiny("llama"))
    assert GateParts().to_tensors() == {}
    assert set(model.cascade.to_tensors()) == {
        f"cascade.{name}"
        for name in ("threshold", "weight", "decay", "exit_confidence", "min_probability",
                     "temperature")
    }  # fmt: skip


def test_a_class_whose_factor_is_zero_never_leaves():
    ids = texts(6, 30)
    model = gated_model(build_tiny("llama"), {"routes": ROUTES}, ids, share=0.8)
    found = model(ids, use_cache=False, exits="simulate")
    classes = model.gates.token_classes[ids.numpy()]
    gone = (found.exit_layers < 4).numpy()
    assert not gone[classes == 3].any()
    assert all(gone[classes == kind].any() for kind in (0, 1, 2, 4))


def test_tokens_that_are_not_known_do_not_leave():
    ids = texts()
    model = gated_model(build_tiny("llama"), {"routes": ROUTES}, ids, share=0.9)
    embedded = model.get_input_embeddings()(ids)
    found = model(inputs_embeds=embedded, use_cache=False, exits="simulate")
    assert (found.exit_layers == 4).all()
    assert found.risks.isnan().all()


def test_states_before_that_are_not_known_let_nobody_leave():
    ids = texts()
    model = gated_model(build_tiny("llama"), {"fusion": "static"}, ids, share=0.9)
    controller = model.assembly.controller(model.cascade)
    hidden = torch.randn(5, 32)
    decision = controller.step(0, hidden, controller.start(5))
    assert np.isnan(decision.risk).all()
    assert decision.tries == 0
    assert np.isnan(controller.risks(0, hidden)).all()
    assert np.isfinite(controller.risks(0, hidden, hidden + 1)).all()


@pytest.mark.parametrize("fusion", ["static", "gated"])
def test_nan_in_any_modality_never_leaves(fusion):
    ids = texts()
    model = gated_model(build_tiny("llama"), {"fusion": fusion}, ids, share=0.95)
    controller = model.assembly.controller(model.cascade)
    from sedac_hf.core.cascade_state import StepContext

    before, hidden = torch.randn(3, 32), torch.randn(3, 32)
    state = controller.start(3, StepContext(before=before))
    controller.step(0, hidden, state)
    for name in ("entropy", "consistency", "perplexity"):
        own = np.full(3, 0.9, np.float32)
        if name == "perplexity":
            own[1] = np.nan
        else:
            state.seen.risks[name][1] = torch.nan
        sure = controller.sureness(0, own, state)
        assert np.isnan(sure[1])
        assert not sure[1] >= 0.0
        state = controller.start(3, StepContext(before=before))
        controller.step(0, hidden, state)
    before[1] = torch.nan
    decision = controller.step(0, hidden, controller.start(3, StepContext(before=before)))
    assert np.isnan(decision.risk[1])
    assert not decision.try_exit[1]


def test_rules_that_need_missing_parts_are_refused():
    model = wrap(build_tiny("llama"))
    layers = model.cascade.layers
    for options, words in (
        ({"fusion": "static"}, "no fusion weights"),
        ({"routes": ROUTES}, "no table of classes"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.set_cascade(CascadeConfig(layers, **options))
    with_table = GateParts(token_classes=np.zeros(4, np.uint8))
    model.set_gates(with_table)
    with pytest.raises(ConfigError, match="one entry for each class"):
        model.set_cascade(CascadeConfig(layers, routes=ROUTES[:2]))
    with pytest.raises(ConfigError, match="bytes below"):
        GateParts(token_classes=np.full(4, 9, np.uint8))


def test_rules_with_options_survive_tensors_and_policies():
    from sedac_hf.calibration.pareto import Policy

    model = gated_model(build_tiny("llama"), {}, texts())
    layers = model.cascade.layers
    for options in PARTS.values():
        cascade = CascadeConfig(layers, **options)
        tensors = cascade.to_tensors()
        again = CascadeConfig.from_tensors(tensors, cascade.layer_indices)
        assert again.fusion == cascade.fusion
        assert again.adaptive_decay == cascade.adaptive_decay
        rounded = [(float(np.float32(r.threshold)), float(np.float32(r.gap))) for r in ROUTES]
        assert [(r.threshold, r.gap) for r in again.routes] == (rounded if cascade.routes else [])
        policy = Policy(again, 0.01, 0.2, 0.9)
        assert Policy.from_dict(policy.to_dict()) == policy
    assert "options" not in Policy(CascadeConfig(layers), 0.0, 0.1, 1.0).to_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClassRule(-1.0), "at least 0"),
        (lambda: ClassRule(1.0, float("nan")), "gap"),
        (lambda: AdaptiveDecay(0.0), "not 0"),
        (lambda: AdaptiveDecay(1.0, momentum=1.0), "below 1"),
        (lambda: replace(wrap(build_tiny("llama")).cascade, fusion="other"), "fusion must be"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_hard_texts_keep_less_of_what_came_before(micro_model: MicroModel):
    some = torch.tensor([d.ids for d in micro_model.language.documents(6, seed=1)])
    model = gated_model(micro_model.model, {}, some, share=0.7)
    layers = [replace(layer, decay=0.9) for layer in model.cascade.layers]
    found = []
    for scale in (1e-3, 1e9):  # every text wholly uncertain, and none at all
        rule = AdaptiveDecay(scale, bonus=0.0)
        model.set_cascade(CascadeConfig(layers, adaptive_decay=rule))
        # The first position has no history.
        found.append(model(some, use_cache=False, exits="simulate").confidences[:, 1:])
    firsts = [each[..., 0] for each in found]
    assert torch.equal(*firsts)
    for gamma, confidences in zip((0.5, 0.9), found, strict=True):
        both = ~confidences[..., 1].isnan()
        assert both.any()
        # What the second checkpoint must have added for its confidence to be what it is.
        added = confidences[..., 1] * (gamma + 1) - gamma * confidences[..., 0]
        assert ((added[both] > -1e-5) & (added[both] < 1 + 1e-5)).all()
    same = ~(found[0][..., 1].isnan() | found[1][..., 1].isnan())
    assert not torch.equal(found[0][..., 1][same], found[1][..., 1][same])
