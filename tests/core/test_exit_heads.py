"""Exit heads: what an untrained one is, own K/V, feedback, and the two ways of storing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sedac_hf.calibration.head_storage import stored
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.exit_heads import ExitBlock, ExitHead, ExitLens, build_exit_head, rms_normalise
from sedac_hf.errors import ArtefactError

IDS = torch.tensor([[3, 5, 7, 9, 11], [2, 4, 6, 8, 10]])


def recorded(shell: BaseShell, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, list]:
    """States after layer 0 and the calls of all layers."""
    with torch.no_grad():
        hidden, calls = shell.prologue(input_ids=ids, use_cache=False)
        return shell.layer(0, hidden, calls[0]), calls


def randomised(head: ExitHead) -> ExitHead:
    """The head with every weight moved."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return head


def test_an_untrained_lens_is_the_logit_lens(tiny: PreTrainedModel) -> None:
    shell = BaseShell(tiny)
    head = build_exit_head(CheckpointSpec(0, head="lens", lens_rank=3), shell)
    assert isinstance(head, ExitLens)
    hidden, _ = recorded(shell)
    assert torch.equal(head(hidden), hidden)


@pytest.mark.parametrize("feedback", [False, True])
def test_an_untrained_block_is_the_last_layer(tiny: PreTrainedModel, feedback: bool) -> None:
    shell = BaseShell(tiny)
    head = build_exit_head(CheckpointSpec(0, feedback=feedback), shell)
    assert isinstance(head, ExitBlock)
    hidden, calls = recorded(shell)
    last = shell.num_layers - 1
    with torch.no_grad():
        torch.testing.assert_close(
            head(hidden, calls[last], feedback=torch.randn_like(hidden)),
            shell.layer(last, hidden, calls[last], None),
        )


def test_two_layers_begin_from_the_last_two(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    head = build_exit_head(CheckpointSpec(0, num_layers=2), shell)
    assert head.cache_layers == 2
    hidden, calls = recorded(shell)
    last = shell.num_layers - 1
    with torch.no_grad():
        expected = shell.layer(last - 1, hidden, calls[last - 1], None)
        expected = shell.layer(last, expected, calls[last], None)
        torch.testing.assert_close(head(hidden, calls[last]), expected)


def test_building_a_head_leaves_the_base_as_it_was(tiny: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    randomised(build_exit_head(CheckpointSpec(0), BaseShell(tiny)))
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_step_by_step_with_own_cache_equals_the_whole_sequence(
    llama: PreTrainedModel, num_layers: int
) -> None:
    shell = BaseShell(llama)
    head = randomised(build_exit_head(CheckpointSpec(0, num_layers=num_layers), shell))
    hidden, calls = recorded(shell)
    last = shell.num_layers - 1
    with torch.no_grad():
        whole = head(hidden, calls[last])
        cache = DynamicCache()
        base_cache = DynamicCache()
        for t in range(IDS.shape[1]):
            _, step = shell.prologue(
                input_ids=IDS[:, t : t + 1],
                position_ids=torch.full((2, 1), t),
                past_key_values=base_cache,
                use_cache=True,
            )
            state = hidden[:, t : t + 1]
            if t % 2:  # positions at which the head is not run are filled
                head.fill(state, step[last], cache)
            else:
                out = head(state, step[last], cache)
                torch.testing.assert_close(out, whole[:, t : t + 1], rtol=1e-4, atol=1e-5)
            assert cache.get_seq_length() == t + 1


def test_feedback_is_read_and_its_size_is_not(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    head = randomised(build_exit_head(CheckpointSpec(0, feedback=True), shell))
    hidden, calls = recorded(shell)
    call, feedback = calls[-1], torch.randn_like(hidden)
    with torch.no_grad():
        out = head(hidden, call, feedback=feedback)
        torch.testing.assert_close(head(hidden, call, feedback=9 * feedback), out)
        assert not torch.allclose(head(hidden, call, feedback=-feedback), out)
        nothing = head(hidden, call, feedback=torch.zeros_like(hidden))
        assert torch.equal(head(hidden, call), nothing)


def test_a_zero_state_stays_zero() -> None:
    assert torch.equal(rms_normalise(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_whole_storage_rounds_to_bfloat16_and_no_further(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    head = randomised(build_exit_head(CheckpointSpec(0), shell))
    again = stored(head, shell, head.spec)
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16().to(value.dtype))


def test_a_delta_of_full_rank_keeps_the_block_and_of_low_rank_is_small(
    llama: PreTrainedModel,
) -> None:
    shell = BaseShell(llama)
    head = randomised(build_exit_head(CheckpointSpec(0), shell))
    width = llama.config.hidden_size
    full = stored(head, shell, replace(head.spec, storage="delta", delta_rank=width))
    for name, value in head.state_dict().items():
        torch.testing.assert_close(full.state_dict()[name], value, rtol=2e-2, atol=2e-2)
    low = replace(head.spec, storage="delta", delta_rank=1)
    sizes = [
        sum(t.numel() for t in stored(head, shell, spec).export_tensors(shell).values())
        for spec in (head.spec, low)
    ]
    assert sizes[1] < 0.5 * sizes[0]


def test_missing_unexpected_and_misshapen_tensors_are_named(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    head = build_exit_head(CheckpointSpec(0), shell)
    tensors = head.export_tensors(shell)
    name = next(iter(tensors))
    for damaged in (
        {n: t for n, t in tensors.items() if n != name},
        {**tensors, "extra": torch.zeros(1)},
        {**tensors, name: tensors[name][:1]},
    ):
        with pytest.raises(ArtefactError, match=r"missing|unexpected|shape"):
            head.import_tensors(damaged, shell)


def test_a_delta_without_its_other_half_is_refused(llama: PreTrainedModel) -> None:
    shell = BaseShell(llama)
    head = build_exit_head(CheckpointSpec(0, storage="delta", delta_rank=2), shell)
    tensors = head.export_tensors(shell)
    half = next(n for n in tensors if n.endswith(".delta_down"))
    del tensors[half]
    with pytest.raises(ArtefactError, match="counterpart"):
        head.import_tensors(tensors, shell)
