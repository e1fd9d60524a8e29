"""The native pass against the base's own forward of each path, and against itself in company."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sedac_hf import _core
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.exit_cache import ExitCache
from sedac_hf.core.exit_heads import ExitHead, build_exit_head
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.row_pass import BASE, Placement
from sedac_hf.errors import NotNativeError
from tests.native import (
    LENGTH,
    PATHS,
    behind,
    by_the_base,
    logits_of,
    prompted,
    started,
    tree_behind,
)
from tests.tiny_models import WIDTH, build_tiny, prompt

NATIVE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "smollm3",
)
HALVES = (torch.bfloat16, torch.float16)
KERNELS = ("scalar", "avx2", "avx512", "avx512bf16", "neon")


@pytest.fixture(params=NATIVE)
def native_base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_tiny(request.param)


def test_a_chain_behind_a_loaded_prompt_is_the_bases_own_forward(
    native_base: PreTrainedModel,
) -> None:
    ids = prompt(2, LENGTH + 5)
    run = started(native_base)
    length = run.load(prompted(native_base, ids[:, :LENGTH]))
    assert length.tolist() == [LENGTH, LENGTH]
    found = [logits_of(run, ids[:, LENGTH : LENGTH + 2], behind(length, 2))]
    found.append(logits_of(run, ids[:, LENGTH + 2 :], behind(length + 2, 3)))
    expected = by_the_base(native_base, ids)[:, LENGTH:]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_every_path_of_a_tree_is_the_bases_own_forward_of_it_and_the_accepted_one_stays(
    native_base: PreTrainedModel,
) -> None:
    ids, nodes = prompt(1, LENGTH), prompt(1, len(PATHS), seed=1)
    run = started(native_base)
    run.load(prompted(native_base, ids))
    found = logits_of(run, nodes, tree_behind(LENGTH))
    for node, path in enumerate(PATHS):
        text = torch.cat([ids, nodes[:, list(path)]], 1)
        expected = by_the_base(native_base, text)[:, -1]
        torch.testing.assert_close(found[:, node], expected, rtol=1e-4, atol=1e-4)
    run.keep(BASE, np.array([LENGTH]), np.array([PATHS[-1]]), np.array([3]))
    following = prompt(1, 2, seed=2)
    text = torch.cat([ids, nodes[:, list(PATHS[-1])], following], 1)
    found = logits_of(run, following, behind([LENGTH + 3], 2))
    expected = by_the_base(native_base, text)[:, -2:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_and_ragged_rows_change_nothing(native_base: PreTrainedModel) -> None:
    ids, short = prompt(2, LENGTH), 4
    mask = torch.ones_like(ids)
    mask[1, :short] = 0
    run = started(native_base)
    run.load(prompted(native_base, ids, mask))
    nodes = prompt(2, 3, seed=1)
    # The first row settles two nodes, the second none: their slots part.
    logits_of(run, nodes[:, :2], behind([LENGTH, LENGTH], 2, first=[0, short]))
    at = behind([LENGTH + 2, LENGTH], 3, first=[0, short])
    found = logits_of(run, nodes, at)
    texts = (torch.cat([ids[:1], nodes[:1, :2], nodes[:1]], 1), torch.cat([ids, nodes], 1)[1:])
    for row, text in enumerate((texts[0], texts[1][:, short:])):
        expected = by_the_base(native_base, text)[0, -3:]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_what_is_stored_continues_in_the_base(native_base: PreTrainedModel) -> None:
    ids = prompt(2, LENGTH + 4)
    cache = prompted(native_base, ids[:, :LENGTH])
    run = started(native_base)
    length = run.load(cache)
    logits_of(run, ids[:, LENGTH : LENGTH + 3], behind(length, 3))
    run.store(cache, length + 3)
    assert cache.get_seq_length() == LENGTH + 3
    with torch.no_grad():
        found = native_base(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    expected = by_the_base(native_base, ids)[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_have_the_same_bits_alone_and_in_company(
    name: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel not in _core.pass_kernels():
        pytest.skip(f"this processor cannot run {kernel}")
    monkeypatch.setenv("SEDAC_KERNEL", kernel)
    base = build_tiny(name, dtype=dtype)
    model = NativeModel(BaseShell(base))
    assert model.parts().base.kernel == kernel
    ids, nodes = prompt(3, LENGTH), prompt(3, len(PATHS), seed=1)
    one = tree_behind(LENGTH)
    together = NativePass(model)
    together.begin(3)
    logits_of(together, ids, behind([0] * 3, LENGTH))
    many = Placement(
        *(np.repeat(a, 3, 0) for a in (one.first, one.length, one.positions, one.tree))
    )
    found = logits_of(together, nodes, many)
    for row in range(3):
        for node, path in enumerate(PATHS):
            alone = NativePass(model)
            alone.begin(1)
            text = torch.cat([ids[row], nodes[row, list(path)]])[None]
            for place in range(text.shape[1]):
                last = logits_of(alone, text[:, place : place + 1], behind([place], 1))
            assert torch.equal(last[0, 0], found[row, node])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_layers_in_two_calls_have_the_bits_of_one(dtype: torch.dtype) -> None:
    base = build_tiny("qwen3", dtype=dtype)
    run, at, ids = started(base), behind([0], 5), prompt(1, 5)
    run.begin(1)
    whole = run.layers(run.embed(ids, at.positions), at, 0, 4)
    run.begin(1)
    half = run.layers(run.embed(ids, at.positions), at, 0, 1)
    assert torch.equal(run.layers(half, at, 1, 4), whole)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NATIVE)
def test_halves_are_admitted_and_near_the_base(name: str, dtype: torch.dtype) -> None:
    base = build_tiny(name, dtype=dtype)
    ids = prompt(1, LENGTH)
    run = started(base)
    run.begin(1)
    found = logits_of(run, ids, behind([0], LENGTH))
    exact = by_the_base(copy.deepcopy(base).float(), ids)
    theirs = by_the_base(base, ids).float()
    # No further from the float32 model than the base's own rounding, with some room.
    assert float((found - exact).norm()) <= 1.5 * float((theirs - exact).norm())


def moved(head: ExitHead) -> ExitHead:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


@pytest.mark.parametrize("name", NATIVE)
def test_exit_blocks_run_natively_with_kv_of_their_own(name: str) -> None:
    base = build_tiny(name)
    shell = BaseShell(base)
    specs = (CheckpointSpec(0, feedback=True), CheckpointSpec(1, num_layers=2))
    heads = [moved(build_exit_head(spec, shell)) for spec in specs]
    run = started(base, heads)
    run.begin(1)
    ids = prompt(1, LENGTH)
    with torch.no_grad():
        hidden, calls = shell.prologue(input_ids=ids, use_cache=False)
        feedback = torch.randn(1, LENGTH, WIDTH)
        for k, head in enumerate(heads):
            given = feedback if k == 0 else None
            expected = head(hidden, calls[-1], None, 0, given)
            parts = []
            for start, stop in ((0, 5), (5, LENGTH)):
                own = None if given is None else given[:, start:stop]
                at = behind([start], stop - start)
                parts.append(run.head(k, hidden[:, start:stop], own, at))
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_kv_of_exit_blocks_come_with_the_cache() -> None:
    base = build_tiny("llama")
    shell = BaseShell(base)
    heads = [moved(build_exit_head(CheckpointSpec(0), shell))]
    layout = ExitCache(shell.num_layers, heads)
    ids = prompt(1, LENGTH)
    cache = DynamicCache(config=base.config)
    layout.attach(cache)
    with torch.no_grad():
        hidden, calls = shell.prologue(input_ids=ids, use_cache=False)
        expected = heads[0](hidden, calls[-1], None)
        base(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        _, past = shell.prologue(input_ids=ids[:, :-1], use_cache=False)
        heads[0].fill(hidden[:, :-1], past[-1], cache, layout.first_layer[0])
    run = started(base, heads)
    length = run.load(cache)
    found = run.head(0, hidden[:, -1:], None, behind(length, 1))
    torch.testing.assert_close(found, expected[:, -1:], rtol=1e-4, atol=1e-4)
    run.layers(hidden[:, -1:], behind(length, 1), 0, 4)
    run.store(cache, length + 1)
    assert [cache.get_seq_length(i) for i in range(5)] == [LENGTH] * 5


def test_a_lens_and_the_draft_vocabulary_agree_with_torch(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    lens = moved(build_exit_head(CheckpointSpec(0, head="lens", lens_rank=3), shell))
    draft = torch.nn.Linear(WIDTH, 7, bias=False)
    run = NativePass(NativeModel(shell, [lens]), draft)
    hidden = torch.randn(1, 3, WIDTH)
    run.begin(1)
    with torch.no_grad():
        torch.testing.assert_close(run.head(0, hidden, None, behind([0], 3)), lens(hidden))
        expected = draft(llama.model.norm(hidden))
    for each, logits in ((run, expected), (started(llama), shell.logits(hidden))):
        top = logits.softmax(-1).topk(5)
        places, chances = each.draft_top(hidden, 5)
        assert places.tolist() == top.indices.tolist()
        torch.testing.assert_close(torch.from_numpy(chances), top.values)
    assert run.draft_top(hidden, 99)[0].shape == (1, 3, 7), "no more words than there are"


def test_the_best_word_is_that_of_the_logits(llama: PreTrainedModel) -> None:
    run = started(llama)
    run.begin(1)
    hidden = torch.randn(2, 9, WIDTH)
    hidden[1, 4] = torch.nan
    words, sound = run.best(hidden)
    assert words.tolist() == run.logits(hidden).argmax(-1).tolist()
    assert np.flatnonzero(~sound).tolist() == [13]
    assert np.isnan(run.draft_top(hidden[1:, 4:5], 3)[1]).all()


def test_a_nan_stays_in_its_row(llama: PreTrainedModel) -> None:
    run, at = started(llama), behind([0, 0], 3)
    run.begin(2)
    hidden = torch.randn(2, 3, WIDTH)
    hidden[0, 0, 5] = float("nan")
    logits = run.logits(run.layers(hidden, at, 0, 4))
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


def test_a_pass_without_rows_says_what_to_do(llama: PreTrainedModel) -> None:
    run = started(llama)
    with pytest.raises(NotNativeError, match="load or begin"):
        run.layers(torch.randn(1, 1, WIDTH), behind([0], 1), 0, 1)
    with pytest.raises(NotNativeError, match="empty"):
        run.load(DynamicCache(config=llama.config))
