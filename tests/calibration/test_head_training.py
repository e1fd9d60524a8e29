"""Training of heads and probes: the loss, the pace, and what is learned on the micro model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf.calibration import measurement
from sedac_hf.calibration.documents import Document, batches_of
from sedac_hf.calibration.head_schedule import HeadSchedule
from sedac_hf.calibration.head_training import (
    measure_agreement,
    train_head,
)
from sedac_hf.calibration.measurement import collect_traces, fit_temperatures
from sedac_hf.calibration.probe_training import auroc, share_at_budget, train_probe
from sedac_hf.calibration.states import BaseStates
from sedac_hf.calibration.word_sampler import WordSampler
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.exit_heads import build_exit_head
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.errors import CalibrationError
from tests.micro_model import MicroModel

VOCABULARY = 66


@pytest.fixture(scope="module")
def recorded(
    micro_model: MicroModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BaseShell, BaseStates]:
    """The micro model's states over 120 documents."""
    shell = BaseShell(micro_model.model)
    documents = [Document(np.array(d.ids), 4) for d in micro_model.language.documents(120, seed=31)]
    states = BaseStates(tmp_path_factory.mktemp("states"), documents, [1], 64)
    states.record(shell, progress=False)
    return shell, states


@pytest.mark.parametrize("feedback", [False, True])
def test_a_trained_block_beats_the_untrained_one(
    recorded: tuple[BaseShell, BaseStates], feedback: bool
) -> None:
    shell, states = recorded
    head = build_exit_head(CheckpointSpec(1, feedback=feedback), shell)
    held_out = list(range(100, 120))
    before = measure_agreement(head, shell, states, held_out)[0]
    report = train_head(
        head, shell, states, list(range(100)), held_out, torch.arange(VOCABULARY),
        HeadSchedule(seconds=60, epochs=4, batch_tokens=512, learning_rate=3e-3), progress=False,
    )  # fmt: skip
    assert report.agreement > before + 0.1
    assert report.top[2] >= report.agreement
    assert report.top[8] >= report.top[4] >= report.top[2]
    assert (report.stand_in_agreement is not None) == feedback
    if report.stand_in_agreement is not None:
        assert report.stand_in_agreement > before
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_the_map_before_a_block_learns_as_much_faster_as_its_layer_is_used_to_larger_states(
    recorded: tuple[BaseShell, BaseStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, states = recorded
    rates: list[dict[int, float]] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, closure: Any = None) -> Any:
        rates.append({id(p): g["lr"] for g in self.param_groups for p in g["params"]})
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    final = torch.cat([states.batch([i], 1).final[0].float() for i in range(8)])
    size = float(final.square().mean(-1).median().sqrt())
    assert size > 1.2
    for kind in ("block", "lens"):
        head = build_exit_head(CheckpointSpec(1, head=kind, feedback=kind == "block"), shell)
        train_head(
            head, shell, states, range(30), [100], torch.arange(VOCABULARY),
            HeadSchedule(seconds=60, epochs=0.2, batch_tokens=512), progress=False,
        )  # fmt: skip
        named = {name: rates[-1][id(p)] for name, p in head.named_parameters()}
        usual = named.pop("mix.weight", None)
        assert len(set(named.values())) == 1
        if kind == "block":
            assert usual == pytest.approx(size * next(iter(named.values())), rel=1e-3)


def test_training_is_seeded(recorded: tuple[BaseShell, BaseStates]) -> None:
    shell, states = recorded
    schedule = HeadSchedule(seconds=1e9, epochs=0.3, batch_tokens=512)
    heads = [build_exit_head(CheckpointSpec(1), shell) for _ in range(2)]
    draft = torch.arange(VOCABULARY)
    for head in heads:
        train_head(head, shell, states, range(60), [100], draft, schedule, progress=False)
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        # The pace follows the clock a little; with so large a limit that is below rounding.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_documents_are_refused(recorded: tuple[BaseShell, BaseStates]) -> None:
    shell, states = recorded
    head = build_exit_head(CheckpointSpec(1), shell)
    with pytest.raises(CalibrationError, match="no documents"):
        train_head(head, shell, states, [], [1], torch.arange(4), HeadSchedule(), progress=False)


def test_the_sampled_loss_is_the_full_one_when_every_word_is_taken(llama: PreTrainedModel) -> None:
    shell, words = BaseShell(llama), llama.config.vocab_size
    exited = torch.randn(9, llama.config.hidden_size)
    top_ids = torch.randint(words, (9, 24))
    top_probabilities = torch.rand(9, 24)
    full = torch.log_softmax(shell.logits(exited[None])[0], -1).gather(-1, top_ids)
    expected = -(top_probabilities * full).sum(-1).mean()
    found = WordSampler(shell, torch.arange(words)).loss(exited, top_ids, top_probabilities)
    torch.testing.assert_close(found, expected)


def test_the_sampled_loss_is_near_the_full_one(llama: PreTrainedModel) -> None:
    shell, words = BaseShell(llama), llama.config.vocab_size
    exited = torch.randn(400, llama.config.hidden_size)
    top_ids = torch.randint(10, (400, 24))
    top_probabilities = torch.full((400, 24), 1 / 24)
    sampler = WordSampler(shell, torch.arange(10))
    whole = WordSampler(shell, torch.arange(words)).loss(exited, top_ids, top_probabilities)
    sampled = torch.stack(
        [sampler.loss(exited, top_ids, top_probabilities) for _ in range(20)]
    ).mean()
    torch.testing.assert_close(sampled, whole, rtol=0.02, atol=0.02)


def test_batches_hold_every_document_once_within_the_limit(
    recorded: tuple[BaseShell, BaseStates],
) -> None:
    _, states = recorded
    batches = list(batches_of(states.documents, range(120), 300))
    assert sorted(i for batch in batches for i in batch) == list(range(120))
    assert all(len(batch) * 64 <= 300 for batch in batches)


def test_traces_agree_with_a_direct_computation(recorded: tuple[BaseShell, BaseStates]) -> None:
    shell, states = recorded
    head, draft = build_exit_head(CheckpointSpec(1), shell), torch.arange(40)
    probes = ProbeManager.build(1, 64, 4)
    traces = collect_traces([head], probes, shell, states, [7, 3], draft)
    assert traces.doc_offsets.tolist() == [0, 60, 120]
    assert not traces.eligible[[0, 60]].any()
    assert traces.eligible.sum() == 118
    batch = states.batch([7], 1)
    from sedac_hf.calibration.head_training import exit_states

    with torch.no_grad():
        out = torch.log_softmax(shell.logits(exit_states(head, shell, batch))[0, 3:63], -1)
        full = torch.log_softmax(shell.logits(batch.final)[0, 3:63], -1)
    gold = batch.ids[0, 4:64, None]
    np.testing.assert_allclose(
        traces.nll_full[:60], -full.gather(-1, gold)[:, 0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        traces.delta_nll[:60, 0], (full - out).gather(-1, gold)[:, 0], rtol=1e-3, atol=1e-4
    )
    divergence = torch.nn.functional.kl_div(out, full, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(traces.divergence[:60, 0], divergence, rtol=1e-3, atol=1e-4)
    chance = out[:, :40].softmax(-1).amax(-1)
    np.testing.assert_allclose(traces.probability[:60, 0], chance, rtol=1e-4)
    np.testing.assert_allclose(
        traces.risk[:60, 0], probes.risk(0, batch.states[0, 3:63]).detach(), rtol=1e-4
    )


def test_auroc_by_hand() -> None:
    score = np.array([0.1, 0.4, 0.35, 0.8])
    assert auroc(score, np.array([False, False, True, True])) == pytest.approx(0.75)
    assert auroc(np.ones(4), np.array([False, False, True, True])) == pytest.approx(0.5)
    assert np.isnan(auroc(score, np.ones(4, dtype=bool)))


def test_share_at_budget_by_hand() -> None:
    risk, divergence = np.array([3.0, 1.0, 2.0, 4.0]), np.array([0.3, 0.0, 0.1, 9.0])
    assert share_at_budget(risk, divergence, 0.025) == pytest.approx(0.5)
    assert share_at_budget(risk, divergence, 0.1) == pytest.approx(0.75)
    assert share_at_budget(np.empty(0), np.empty(0), 0.1) == 0.0


def test_a_probe_learns_a_target_that_is_there() -> None:
    torch.manual_seed(0)
    inputs = 300 * torch.randn(4000, 24)
    target = (inputs[:, 0] / 300 * 2).exp()
    probe = train_probe(inputs[:3000], target[:3000], 8)
    risk = probe(inputs[3000:]).detach().numpy()
    hard = (target[3000:] > target.median()).numpy()
    assert auroc(risk, hard) > 0.95


@pytest.mark.parametrize(("scale", "expected"), [(1.25, 1.25), (0.8, 0.8), (1.0, 1.0), (4.0, 1.4)])
def test_an_exit_that_is_too_sure_is_cooled(
    recorded: tuple[BaseShell, BaseStates],
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    expected: float,
) -> None:
    shell, states = recorded
    head = build_exit_head(CheckpointSpec(1), shell)

    own = measurement._exit_logits
    monkeypatch.setattr(measurement, "exit_states", lambda head, shell, batch: batch.final)
    monkeypatch.setattr(measurement, "_exit_logits", lambda shell, state: scale * own(shell, state))
    found = fit_temperatures([head], shell, states, range(80, 110), torch.arange(VOCABULARY))
    assert found == [pytest.approx(expected)]
