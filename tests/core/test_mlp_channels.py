"""MLPs by their channels, and the order of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from sedac_hf.calibration import ChannelOrder, channel_order
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.mlp_channels import channels_of, mlp_of
from sedac_hf.errors import ConfigError, UnsupportedModelError
from tests.soft import documents, importances
from tests.tiny_models import WIDTH, build_tiny

NARROW = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "gpt2",
    "gpt_neox", "falcon",
)  # fmt: skip
WHOLE = ("opt", "mixtral")


@pytest.fixture(params=NARROW)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_tiny(request.param)


def test_all_channels_are_the_mlp_and_the_first_are_those_of_their_order(
    base: PreTrainedModel,
) -> None:
    mlp: Any = mlp_of(BaseShell(base).layers[1])
    states = torch.randn(2, 5, WIDTH)
    channels = channels_of(mlp, check=True)
    torch.testing.assert_close(channels(states), mlp(states))
    order = torch.randperm(channels.count)
    values = channels.values(states)
    down, bias = channels.down
    for count in (1, 13, channels.count):
        kept = order[:count]
        expected = values[..., kept] @ down[:, kept].T + (0 if bias is None else bias)
        found = channels.ordered(order).first(count)(states)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_order_is_that_of_magnitude_times_norm(base: PreTrainedModel) -> None:
    texts = documents()
    order = channel_order(base, texts)
    for found, importance in zip(order.layers, importances(base, texts), strict=True):
        ranked = importance[found]
        assert (ranked.diff() <= 1e-6 * ranked[:-1]).all()
        assert ranked[0] > 1.05 * ranked[-1]


@pytest.mark.parametrize("name", WHOLE)
def test_other_mlps_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"soft exits cannot narrow it.*'hard'"):
        channel_order(build_tiny(name), documents())


def test_hooks_factors_and_adapters_are_noticed(llama: PreTrainedModel) -> None:
    mlp: Any = mlp_of(BaseShell(llama).layers[0])
    handle = mlp.down_proj.register_forward_hook(lambda module, given, out: out)
    with pytest.raises(UnsupportedModelError, match="plain projections"):
        channels_of(mlp)
    handle.remove()

    class Doubled(type(mlp)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    mlp.__class__ = Doubled
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        channels_of(mlp, check=True)
    mlp.down_proj = nn.Sequential(mlp.down_proj)
    with pytest.raises(UnsupportedModelError, match="plain projections"):
        channels_of(mlp)


def test_an_order_survives_being_stored_in_few_bytes(llama: PreTrainedModel) -> None:
    order = channel_order(llama, documents())
    tensors = order.to_tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int16}
    found = ChannelOrder.from_tensors(tensors, 4)
    assert all(map(torch.equal, found.layers, order.layers))
    wide = ChannelOrder((torch.arange(40_000),)).to_tensors()
    assert wide["channels.0"].dtype == torch.int32


def test_an_order_that_does_not_fit_is_refused(llama: PreTrainedModel) -> None:
    tensors = channel_order(llama, documents()).to_tensors()
    with pytest.raises(ConfigError, match="one tensor for each of 5 layers"):
        ChannelOrder.from_tensors(tensors, 5)
    with pytest.raises(ConfigError, match=r"'channels\.2' is no order"):
        ChannelOrder.from_tensors({**tensors, "channels.2": torch.zeros(48)}, 4)
    other = ChannelOrder(tuple(torch.arange(40) for _ in range(4)))
    with pytest.raises(ConfigError, match=r"MLPs of \[40, 40, 40, 40\] channels"):
        other.check_fits(BaseShell(llama))
    with pytest.raises(ConfigError, match="no documents"):
        channel_order(llama, [])
