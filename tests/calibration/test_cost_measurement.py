from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sedac_hf.calibration import cost_measurement as module
from sedac_hf.calibration.cost_measurement import measure_costs, probing_cascades, solve_costs
from sedac_hf.errors import CalibrationError
from sedac_hf.modeling import SedacForCausalLM
from tests.calibration.synthetic import CHECKPOINTS, cost_model
from tests.evaluation.wrapped import LAYERS, wrapped_llama
from tests.generation.test_settled import settled
from tests.tiny_models import build_tiny


def step_times(costs, plain):
    """What a decode step takes under each probing cascade if the costs are those given."""
    count = len(costs.checkpoints)
    times = {"plain": plain}
    for name in probing_cascades(CHECKPOINTS):
        exits, tries, gated = np.zeros((3, 1, count))
        if name != "closed":
            kind, k = name.split()
            tries[0, int(k)] = 1
            exits[0, int(k)] = kind != "fail"
            gated[0, int(k)] = kind != "exit"
        times[name] = plain * costs.expected(exits, tries, gated > 0, 1)[0]
    return times


def test_the_costs_behind_the_times_are_found():
    truth = cost_model()
    found = solve_costs(step_times(truth, 0.02), truth)
    assert found.source == "measured"
    for a, b in zip(found.checkpoints, truth.checkpoints, strict=True):
        for name in ("probe", "fill", "attempt", "gate", "saved"):
            assert getattr(a, name) == pytest.approx(getattr(b, name))


def test_noise_never_makes_a_cost_negative():
    times = dict.fromkeys(probing_cascades(CHECKPOINTS), 0.5) | {"plain": 1.0}
    found = solve_costs(times, cost_model())
    assert all(c.probe == c.fill == c.gate == 0.0 for c in found.checkpoints)


def test_cascades_do_what_their_names_say_and_the_clock_is_read_per_step(monkeypatch):
    """The clock counts layers: a plain step of a 4-layer model takes 4, an exit after layer 0 1."""
    model = wrapped_llama()
    before = model.exit_stats
    asked = []

    def layers_run(call, ids):
        model.exit_stats.reset()
        call(ids)
        stats = model.exit_stats
        tried = tuple(stats.tries_by_layer.values())
        asked.append((stats.tokens, stats.mean_depth, tried))
        return stats.mean_depth * stats.tokens + 100.0

    monkeypatch.setattr(module, "timed_call", layers_run)
    found = measure_costs(model, [[5, 6, 7]], new_tokens=5, rounds=2)
    assert model.exit_stats is before
    # Depth alone: 3 of 4 layers are saved after layer 0, 1 of 4 after layer 2; all else is free.
    assert [c.saved for c in found.checkpoints] == pytest.approx([0.75, 0.25])
    assert all(c.probe == c.fill == c.gate == c.attempt == 0.0 for c in found.checkpoints)
    assert [c.layer_idx for c in found.checkpoints] == list(LAYERS)
    per_round = 2 + 1 + 3 * 2
    assert len(asked) == 3 * per_round
    prompt, plain, closed, fail, leave, sure = asked[-per_round:][:6]
    assert prompt[0] == 1
    assert plain == (5, 4.0, (0, 0))
    assert closed == (5, 4.0, (0, 0))
    assert fail == (5, 4.0, (4, 0))
    assert leave == sure == (5, (4 + 4 * 1) / 5, (4, 0))


def test_what_a_governor_would_turn_off_is_measured_all_the_same(monkeypatch):
    monkeypatch.setenv("SEDAC_GOVERNOR", "on")
    model = settled("feedback", (-1, 1))
    depths = []

    def layers_run(call, ids):
        model.exit_stats.reset()
        call(ids)
        depths.append(model.exit_stats.exit_share)
        return float(model.exit_stats.tokens)

    monkeypatch.setattr(module, "timed_call", layers_run)
    measure_costs(model, [[5, 6, 7]], new_tokens=33, rounds=1)
    # Prompt, plain, closed; then at each checkpoint fail, exit, sure.
    assert depths[-9:] == pytest.approx([0, 0, 0, 0, 32 / 33, 32 / 33, 0, 32 / 33, 32 / 33])


def test_real_times_give_a_usable_model():
    model = wrapped_llama()
    found = measure_costs(model, [[5, 6, 7]], new_tokens=3, rounds=1)
    assert found.depth == 4
    assert found.expected(np.zeros((1, 2)), np.zeros((1, 2)), False, 10)[0] >= 1.0


def test_bad_arguments_are_refused():
    with pytest.raises(CalibrationError, match="no exit heads"):
        measure_costs(SedacForCausalLM.from_base(build_tiny("llama")), [[5]])
    with pytest.raises(CalibrationError, match="at least 2"):
        measure_costs(wrapped_llama(), [[5]], new_tokens=1)


def test_costs_by_parameters_only_divide_what_is_seen_in_sum():
    truth = cost_model()
    skewed = replace(
        truth, checkpoints=tuple(replace(c, attempt=9.0, saved=0.0) for c in truth.checkpoints)
    )
    assert solve_costs(step_times(truth, 1.0), skewed).checkpoints[0].attempt == pytest.approx(0.08)
