"""Replay with decays that follow each document, against the cascade and its history themselves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from sedac_hf import _core
from sedac_hf.core.cascade_config import CascadeConfig, LayerConfig
from sedac_hf.core.cascade_controller import CascadeController
from sedac_hf.core.cascade_options import AdaptiveDecay
from sedac_hf.core.cascade_state import StepContext
from sedac_hf.core.row_history import RowHistory, entropy_of
from sedac_hf.core.session import StepRecord
from tests.rust.test_replay import policies, traces

RULE = AdaptiveDecay(
    scale=float(np.float32(1.7)), bonus=float(np.float32(0.4)), momentum=float(np.float32(0.8))
)


def logits_of(entropy: float) -> torch.Tensor:
    """Logits of two words whose entropy is about as given, at most ln 2."""
    chance = np.linspace(0.5, 1 - 1e-7, 20001)
    spread = -(chance * np.log(chance) + (1 - chance) * np.log1p(-chance))
    best = chance[np.argmin(np.abs(spread - entropy))]
    return torch.tensor([[best, 1 - best]], dtype=torch.float64).log().float()


def stepped(data: dict, rules: dict, p: int, logits: list[torch.Tensor]) -> tuple:
    """One policy token by token, by the controller that a running model uses."""
    layers = [
        LayerConfig(
            k, float(rules["tau"][p, k]), float(rules["weight"][p, k]),
            float(rules["gamma"][p, k]), float(rules["exit_confidence"][p, k]),
            float(rules["min_probability"][p, k]),
        )
        for k in range(rules["tau"].shape[1])
    ]  # fmt: skip
    controller = CascadeController(CascadeConfig(layers, adaptive_decay=RULE))
    exits, tries = [0] * len(layers), [0] * len(layers)
    deltas = []
    for start, stop in pairwise(data["doc_offsets"].tolist()):
        history, total = RowHistory(RULE, 1), 0.0
        for token in range(start, stop):
            record = StepRecord.full_depth(1, len(layers), len(layers))
            context = StepContext(uncertainty=history.uncertainty, bonus=history.bonus)
            state = controller.start(1, context)
            for k in range(len(layers)) if data["eligible"][token] else ():
                risk = np.array([data["risk"][token, k]], np.float32)
                decision = controller.step_risk(k, risk, state)
                record.tries[0, k] = decision.try_exit[0]
                tries[k] += decision.tries
                bar = controller.least_probability(k, state)
                sure = bar is None or data["probability"][token, k] >= bar[0]
                if decision.try_exit[0] and sure:
                    record.checkpoints[0] = k
                    exits[k] += 1
                    total += float(data["delta_nll"][token, k])
                    break
            history.observe(record, logits[token])
        deltas.append(total / (stop - start))
    return deltas, exits, tries


@pytest.mark.parametrize(("lengths", "checkpoints"), [([1, 17, 60], 1), ([40, 33], 3)])
def test_equals_the_running_cascade_token_by_token(lengths, checkpoints):
    data = traces(lengths, checkpoints, 5)
    rules = policies(6, checkpoints, 7)
    rules["exit_confidence"] *= 0.6
    rng = np.random.default_rng(3)
    logits = [logits_of(value) for value in rng.uniform(0, 0.69, len(data["eligible"]))]
    entropy = np.concatenate([entropy_of(each) for each in logits])
    history = (entropy, RULE.scale, RULE.bonus, RULE.momentum)
    found = _core.replay(**data, **rules, history=history)
    assert found["exits"].sum() > 20
    for p in range(6):
        deltas, exits, tries = stepped(data, rules, p, logits)
        assert found["exits"][p].tolist() == exits
        assert found["tries"][p].tolist() == tries
        np.testing.assert_allclose(found["doc_delta"][p], deltas, rtol=1e-5, atol=1e-6)
    if checkpoints > 1:
        assert not np.array_equal(found["exits"], _core.replay(**data, **rules)["exits"])


def test_a_lone_checkpoint_knows_no_decay():
    data, rules = traces([30, 50], 1, 1), policies(10, 1, 2)
    entropy = np.random.default_rng(0).random(80, dtype=np.float32)
    plain, adaptive = (
        _core.replay(**data, **rules, history=h) for h in (None, (entropy, 1.0, 0.2, 0.9))
    )
    for name in ("exits", "tries"):
        np.testing.assert_array_equal(plain[name], adaptive[name])
    np.testing.assert_allclose(plain["doc_delta"], adaptive["doc_delta"], rtol=1e-5, atol=1e-7)


def test_nan_entropy_lets_nobody_leave_after_it():
    data, rules = traces([40], 2, 1), policies(10, 2, 2)
    data["eligible"][:] = True
    rules["exit_confidence"][:], rules["min_probability"][:] = 0.9, 0
    rules["exit_confidence"][:, 0] = 2.0  # nothing leaves at the first, so entropies are seen
    entropy = np.full(40, 0.1, np.float32)
    entropy[0] = np.nan
    found = _core.replay(**data, **rules, history=(entropy, 1.0, 0.0, 0.9))
    data["eligible"][1:] = False  # the first token has no history yet
    first = _core.replay(**data, **rules, history=(entropy, 1.0, 0.0, 0.9))
    np.testing.assert_array_equal(found["exits"], first["exits"])


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ((np.zeros(8, np.float32), 1.0, 0.1, 0.9), "entropy has 8 elements, expected 9"),
        ((np.zeros(9, np.float32), 0.0, 0.1, 0.9), "scale must be"),
        ((np.zeros(9, np.float32), 1.0, -0.1, 0.9), "bonus must be"),
        ((np.zeros(9, np.float32), 1.0, 0.1, 1.0), "momentum must be"),
    ],
)
def test_bad_histories_are_named(history, message):
    with pytest.raises(ValueError, match=message):
        _core.replay(**traces([4, 5], 2, 1), **policies(3, 2, 2), history=history)


def test_decays_of_rows_need_both_arrays():
    cascade = _core.Cascade(*(np.ones(1, np.float32) for _ in range(4)))
    zeros = [np.zeros(3, np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match="belong together"):
        cascade.step_risk(0, zeros[0], zeros[1], gamma=zeros[2])
    with pytest.raises(ValueError, match="gamma has 2 elements"):
        cascade.step_risk(0, zeros[0], zeros[1], gamma=zeros[2][:2], most=np.zeros(3, np.float32))
