from __future__ import annotations

import copy
from itertools import count, repeat
from types import SimpleNamespace

import pytest
import torch

from sedac_hf.core.exit_stats import ExitStats
from sedac_hf.errors import CalibrationError, ConfigError, ModeError
from sedac_hf.evaluation import benchmark
from sedac_hf.evaluation.arms import Arm, base_arm, make_batches, mode_arm
from sedac_hf.evaluation.bench import run_bench
from sedac_hf.evaluation.bench_plan import BenchPlan
from sedac_hf.modeling import SedacForCausalLM
from tests.artefacts import issue
from tests.tiny_models import build_tiny
from tests.wrapping import wrap

MODES = ("exact", "certified", "plain", "off")
SECOND = ("exact (modules)", "plain (modules)")
# Seconds that the invented clock gives to a call of each arm.
PACE = {
    "generate": 0.6, "plain": 0.4, "exact": 0.3, "certified": 0.2, "off": 0.6,
    "exact (modules)": 0.35, "plain (modules)": 0.5,
    "prompt_lookup": 0.9, "assistant_early_exit": 2.4, "llama_cpp": 0.15,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(micro_model):
    """The micro model with exits of no use, which all tokens take."""
    return wrap(micro_model.model, {1: "lens"})


@pytest.fixture(scope="module")
def prompts(micro_model):
    """Beginnings of documents of different lengths, in two groups."""
    documents = micro_model.language.documents(16, seed=9)
    rows = [document.ids[: 6 + at % 5] for at, document in enumerate(documents)]
    return {"chat": rows[:8], "code": rows[8:]}


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock: calls still write, but take the time of their arm.

    Gives the list of calls: arm, prompts, tokens written.
    """
    calls, names, take_turns = [], {}, benchmark.take_turns

    def named(model, arms, inputs, **options):
        names.update({id(arm): name for name, arm in arms.items()})
        return take_turns(model, arms, inputs, **options)

    def timed(arm, batch):
        arm(batch)
        name = names[id(arm)]
        calls.append((name, batch.ids.tolist(), arm.new_tokens(batch)))
        # The search for an assistant's layer names its arms by their layers.
        return PACE[name] if name in PACE else float(name)

    for where in ("sedac_hf.evaluation.bench", "sedac_hf.evaluation.rivals"):
        monkeypatch.setattr(f"{where}.take_turns", named)
    monkeypatch.setattr(benchmark, "timed_call", timed)
    return calls


def plan(**values):
    """A small plan; batches of two, so that no rivals are tried."""
    small = {"groups": ("chat",), "batches": (2,), "tokens": 6, "prompts": 4, "repeats": 1}
    return BenchPlan(**{**small, **values})


def by_mode(result, group="chat", batch=2):
    return {
        row["mode"]: row for row in result.rows if (row["group"], row["batch"]) == (group, batch)
    }


# ------------------------------------------------------------------------------------- the ratios


def test_every_ratio_is_that_of_the_times_and_gains_multiply(model, prompts, clock):
    found = by_mode(run_bench(model, prompts, plan(batches=(1,), prompts=2)), batch=1)
    assert set(found) == {*MODES, *SECOND}
    for mode, row in found.items():
        for other in ("generate", "prompt_lookup", "assistant_early_exit"):
            assert row[f"vs_{other}"] == pytest.approx(PACE[other] / PACE[mode]), (mode, other)
        assert row["vs_generate_ci95"] == pytest.approx([row["vs_generate"]] * 2)
        assert row["vs_llama_cpp"] is None
        # Exits and passes are told apart: plain is that on the row's own pass.
        plain = PACE["plain (modules)" if mode in SECOND else "plain"]
        assert row["vs_plain"] == pytest.approx(plain / PACE[mode])
        assert row["loop_gain"] == pytest.approx(PACE["generate"] / plain)
        assert row["loop_gain"] * row["vs_plain"] == pytest.approx(row["vs_generate"])
        assert row["tokens_per_second"] == pytest.approx(6 / PACE[mode])


def test_modes_run_on_both_passes_and_say_on_which(model, prompts, clock):
    found = by_mode(run_bench(model, prompts, plan()))
    for mode in ("exact", "plain"):
        native, modules = found[mode], found[f"{mode} (modules)"]
        assert (native["runs_on"], modules["runs_on"]) == ("native", "modules")
        gain = PACE[f"{mode} (modules)"] / PACE[mode]
        assert native["vs_modules"] == pytest.approx(gain)
        assert modules["vs_modules"] is None
        assert modules["token_equal"] is True
    assert found["off"]["runs_on"] == "modules"
    assert found["off"]["vs_modules"] is found["certified"]["vs_modules"] is None
    assert model.exit_stats.runs_on in ("", "native"), "the model's own statistics are left alone"


def test_plain_on_the_modules_is_timed_for_the_ratio_though_it_has_no_row(model, prompts, clock):
    found = by_mode(run_bench(model, prompts, plan(modes=("exact",))))
    assert set(found) == {"exact", "exact (modules)"}
    assert found["exact (modules)"]["vs_plain"] == pytest.approx(0.5 / 0.35)


def test_without_the_native_pass_there_is_one_row_a_mode_and_the_reason(prompts, clock):
    model = SedacForCausalLM.from_base(build_tiny("gpt2"), self_check=False)
    result = run_bench(model, {"chat": [[5, 6, 7], [8, 9]]}, plan(modes=("plain",)))
    assert set(by_mode(result)) == {"plain"}
    assert result.rows[0]["runs_on"] == "modules"
    assert any(line.startswith("rows of the base's modules apart") for line in result.left_out)


def test_a_quick_run_has_second_rows_at_batch_1_only(model, prompts, clock):
    sizes = {**BenchPlan.quick_sizes(), "seconds": None, "tokens": 2, "prompts": 2}
    quick = BenchPlan(**sizes, groups=("chat",), batches=(1, 2), modes=("plain",))
    result = run_bench(model, prompts, quick)
    assert set(by_mode(result, batch=1)) == {"plain", "plain (modules)"}
    assert set(by_mode(result, batch=2)) == {"plain"}


def test_a_prompt_counts_once_however_often_it_is_repeated(model, prompts, monkeypatch):
    """Medians over rounds first, then over prompts: 2, 2, 90 of one batch are 2."""
    spent = {
        "exact": iter([1, 1, 1, 1, 1, 1, 1, 1, 1]),
        "plain": iter([2, 4, 6, 2, 4, 6, 90, 4, 90]),
    }
    names, take_turns = {}, benchmark.take_turns

    def named(model, arms, inputs, **options):
        names.update({id(arm): name for name, arm in arms.items()})
        return take_turns(model, arms, inputs, **{**options, "warm_up": 0})

    def timed(arm, batch):
        arm(batch)
        return float(next(spent.get(names[id(arm)], repeat(1))))

    monkeypatch.setattr("sedac_hf.evaluation.bench.take_turns", named)
    monkeypatch.setattr(benchmark, "timed_call", timed)
    small = plan(modes=("exact",), repeats=3, prompts=6)
    row = run_bench(model, prompts, small).rows[0]
    assert row["vs_plain"] == 4.0
    assert row["vs_plain_ci95"] == [2.0, 6.0]


def test_a_rival_that_writes_less_is_measured_by_the_token(model, prompts, monkeypatch):
    monkeypatch.setattr(benchmark, "timed_call", lambda arm, batch: arm(batch) or 1.0)

    def half(_, settings):
        return base_arm(model, {**settings, "max_new_tokens": 3, "min_new_tokens": 3})

    monkeypatch.setattr("sedac_hf.evaluation.bench.lookup_arm", half)
    alone = plan(batches=(1,), prompts=2, modes=("off",))
    for row in run_bench(model, prompts, alone).rows:
        assert row["vs_prompt_lookup"] == pytest.approx(2.0)


def test_all_arms_write_the_same_prompts_at_the_same_length(model, prompts, clock):
    run_bench(model, prompts, plan(batches=(1, 4), prompts=4))
    timed = [call for call in clock if call[0] in PACE]
    assert {tokens for *_, tokens in timed} == {6}
    for name in ("exact", "certified", "plain", "off"):
        assert [p for n, p, _ in timed if n == name] == [p for n, p, _ in timed if n == "generate"]
    assert {len(p) for _, p, _ in timed} == {1, 4}
    assert {len(p) for n, p, _ in timed if n == "prompt_lookup"} == {1}


def test_intervals_are_over_prompts_and_missing_where_there_is_one(model, prompts):
    small = plan(batches=(2, 8), prompts=8, modes=("plain", "off"))
    for row in run_bench(model, prompts, small).rows:
        several = row["batch"] == 2
        assert (row["vs_generate_ci95"] is not None) == several
        if several:
            low, high = row["vs_generate_ci95"]
            assert 0 < low <= row["vs_generate"] <= high
        assert row["prompts"] == 8


# ------------------------------------------------------------------------------------- the tokens


def test_modes_that_promise_the_bases_tokens_have_them_and_another_model_does_not(model, prompts):
    for batch in (2, 4):
        found = by_mode(run_bench(model, prompts, plan(batches=(batch,), tokens=9)), batch=batch)
        for mode in ("exact", "plain", "off"):
            assert found[mode]["token_equal"] is True
            assert found[mode]["divergence_gap"] == found[mode]["divergence_units"] == 0.0
            assert found[mode]["token_checked"] == 4
        # Exits that know nothing are final in certified mode.
        assert found["certified"]["token_equal"] is False
        assert found["certified"]["token_differing"] > 0
        assert found["certified"]["divergences"] == found["certified"]["token_differing"]
        assert found["certified"]["divergence_gap"] > 0


def test_tokens_are_compared_in_float32_whatever_is_timed(micro_model, prompts):
    exact = wrap(micro_model.model, {1: "lens"})
    timed = copy.deepcopy(exact).to(torch.bfloat16)
    with torch.no_grad():  # what is timed writes other tokens than its base in float32
        timed.base_lm.model.layers[3].mlp.down_proj.weight.mul_(-8.0)
    small = plan(modes=("plain", "certified"), batches=(4,), prompts=8, checked=1)
    found = by_mode(run_bench(timed, prompts, small, in_float32=lambda: exact), batch=4)
    assert found["plain"]["token_equal"] is True
    assert found["plain"]["token_checked"] == 4
    assert found["certified"]["token_equal"] is False


def test_without_a_model_in_float32_tokens_are_not_compared(micro_model, prompts):
    timed = wrap(micro_model.model, {1: "lens"}).to(torch.bfloat16)
    try:
        result = run_bench(timed, prompts, plan(modes=("plain",)))
    finally:
        micro_model.model.float()
    assert result.rows[0]["token_equal"] is None
    assert result.rows[0]["token_checked"] == 0
    assert any("float32" in line for line in result.left_out)


def test_statistics_of_drafts_become_acceptance_and_tokens_a_pass(model, prompts, monkeypatch):
    own = ExitStats.to_dict

    def with_drafts(stats):
        drafts = (
            {"drafts": {"offered": 40, "accepted": 10, "tokens_per_pass": 2.5}}
            if stats.tokens
            else {}
        )
        return {**own(stats), **drafts}

    found = by_mode(run_bench(model, prompts, plan(modes=("certified", "plain"))))
    assert found["plain"]["acceptance"] is None
    assert found["plain"]["tokens_per_tail_pass"] == 1.0
    # All but the first of six tokens leave, so they share the one pass through the tail.
    assert found["certified"]["exit_share"] == pytest.approx(5 / 6)
    assert found["certified"]["tokens_per_tail_pass"] == pytest.approx(6.0)
    monkeypatch.setattr(ExitStats, "to_dict", with_drafts)
    found = by_mode(run_bench(model, prompts, plan()))
    assert found["exact"]["acceptance"] == 0.25
    assert found["exact"]["tokens_per_tail_pass"] == 2.5
    assert found["off"]["acceptance"] is None


def test_the_models_own_statistics_are_left_alone(model, prompts):
    before = model.exit_stats.to_dict()
    run_bench(model, prompts, plan())
    assert model.exit_stats.to_dict() == before


# ----------------------------------------------------------------------------- what cannot be had


def test_a_rival_that_fails_on_an_architecture_leaves_its_reason_in_the_row():
    model = SedacForCausalLM.from_base(build_tiny("gpt2"), self_check=False)
    layers = model.base_lm.config.num_hidden_layers
    result = run_bench(model, {"chat": [[5, 6, 7], [8, 9]]}, plan(batches=(1,)))
    for row in result.rows:
        assert row["vs_assistant_early_exit"] is None
        assert any("assistant_early_exit: IndexError" in note for note in row["notes"])
        assert row["vs_prompt_lookup"] > 0
    assert model.base_lm.config.num_hidden_layers == layers
    assert result.early_exit.layer is None


def test_rivals_of_larger_batches_say_why_they_are_missing(model, prompts):
    for row in run_bench(model, prompts, plan(modes=("plain",))).rows:
        assert row["vs_assistant_early_exit"] is row["vs_prompt_lookup"] is None
        assert sum("batch 1 only" in note for note in row["notes"]) == 2


def test_a_refused_mode_is_left_out_by_name(model, prompts, monkeypatch):
    monkeypatch.setattr(model, "refused_modes", {"certified": "the base has changed"})
    result = run_bench(model, prompts, plan())
    assert set(by_mode(result)) == {"exact", "plain", "off", *SECOND}
    assert "certified: the base has changed" in result.left_out


def test_what_covers_the_exits_is_noted(micro_model, prompts):
    model = wrap(micro_model.model, {1: "lens"})
    small = plan(modes=("certified", "exact"), tokens=2)

    def notes(mode="certified"):
        found = by_mode(run_bench(model, prompts, small))[mode]["notes"]
        return [note for note in found if note.startswith("exits")]

    assert notes() == ["exits act on thresholds that no certificate covers"]
    assert notes("exact") == []
    model.certificate = issue(model.cascade)
    assert notes() == []
    model.exits_off_reason = "another data type"
    assert notes() == ["exits are off: another data type"]
    model.set_cascade(None)
    assert notes() == ["exits are off: no policy is certified for this model"]


def test_what_no_time_is_left_for_is_named(model, prompts, monkeypatch):
    ticks = SimpleNamespace(monotonic=count(0, 1000).__next__)
    monkeypatch.setattr("sedac_hf.evaluation.bench_budget.time", ticks)
    # Every look at the clock takes 1000 s. Of a second cell not even half would end in time.
    wide = plan(groups=("chat", "code"), batches=(2, 4), modes=("off",), seconds=6500)
    result = run_bench(model, prompts, wide)
    assert {(row["group"], row["batch"]) for row in result.rows} == {("chat", 2)}
    assert [line for line in result.left_out if "no time left" in line] == [
        "code at batch 2: no time left",
        "chat at batch 4: no time left",
        "code at batch 4: no time left",
    ]


def test_what_only_a_part_is_measured_of_is_named(model, prompts, monkeypatch):
    ticks = SimpleNamespace(monotonic=count(0, 1000).__next__)
    monkeypatch.setattr("sedac_hf.evaluation.bench_budget.time", ticks)
    # A batch took 500 s; when the second cell is planned, 760 s are left.
    part = plan(groups=("chat", "code"), modes=("off",), seconds=7760)
    result = run_bench(model, prompts, part)
    assert [row["prompts"] for row in result.rows] == [4, 2]
    assert "code at batch 2: 1 of 2 batches, no time left" in result.left_out


def test_llama_cpp_gets_a_row_and_a_ratio(model, prompts, clock):
    settings = benchmark.greedy_settings(model, 6)
    alone = plan(batches=(1,), prompts=2, modes=("plain",))
    result = run_bench(model, prompts, alone, llama=base_arm(model, settings))
    found = by_mode(result, batch=1)
    assert found["llama_cpp"]["vs_plain"] == pytest.approx(PACE["plain"] / 0.15)
    assert found["llama_cpp"]["token_equal"] is None
    assert found["plain"]["vs_llama_cpp"] == pytest.approx(0.15 / PACE["plain"])


# ---------------------------------------------------------------------------------- plan, batches


def test_batches_are_padded_on_the_left_and_filled_by_repetition():
    first, second = make_batches([[1], [2, 3], [4], [5], [6]], 2, pad=9)
    assert first.ids.tolist() == [[9, 1], [2, 3]]
    assert first.mask.tolist() == [[0, 1], [1, 1]]
    assert second.ids.tolist() == [[4], [5]]
    (only,) = make_batches([[1], [2]], 3, pad=9)
    assert only.ids.tolist() == [[1], [2], [1]]
    assert first.row(first.ids, 0, 2).tolist() == [[1]]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_prompts_without_tokens_are_refused(prompts):
    with pytest.raises(CalibrationError, match="prompt"):
        make_batches(prompts, 1, pad=0)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"groups": ("poems",)}, ConfigError),
        ({"modes": ("turbo",)}, ModeError),
        ({"batches": ()}, ConfigError),
        ({"batches": (0, 1)}, ConfigError),
        ({"modes": ("plain", "plain")}, ConfigError),
        ({"tokens": 0}, ConfigError),
        ({"repeats": 0}, ConfigError),
    ],
)
def test_plans_that_cannot_be_are_refused(values, error):
    with pytest.raises(error):
        BenchPlan(**values)


def test_a_quick_run_warms_up_its_first_cell_only(model, prompts, clock):
    sizes = {**BenchPlan.quick_sizes(), "seconds": None, "tokens": 2, "prompts": 4}
    quick = BenchPlan(**sizes, groups=("chat", "code"), batches=(2,), modes=("off",))
    run_bench(model, prompts, quick)
    # Two batches a group, and one more of the first before they count.
    assert [name for name, *_ in clock].count("off") == 1 + 2 + 2


def test_arms_of_modes_write_what_the_mode_writes(model, prompts):
    (batch,) = make_batches(prompts["chat"][:2], 2, pad=0)
    settings = benchmark.greedy_settings(model, 5)
    arm = mode_arm(model, "certified", settings)
    arm(batch)
    expected = model.generate(
        input_ids=batch.ids, attention_mask=batch.mask, sedac_mode="certified", **settings
    )
    assert torch.equal(arm.texts[0], expected)
    assert isinstance(arm, Arm)
    assert arm.new_tokens(batch) == 5
