"""Embeddings that the Rust core reads in place: those of the module, or none at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sedac_hf.core.native_embedding import describe_embedding
from tests.tiny_models import build_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_embeddings_are_those_of_the_module(architecture: str, dtype: torch.dtype) -> None:
    module = build_tiny(architecture, dtype=dtype).get_input_embeddings()
    found = describe_embedding(module)
    assert found is not None
    ids = torch.arange(module.num_embeddings)
    with torch.no_grad():
        expected = module(ids).float().flatten()
    assert torch.equal(torch.tensor(found.look_up(ids.numpy())), expected)
    for wrong in (-1, module.num_embeddings):
        with pytest.raises(ValueError, match="row of the embedding"):
            found.look_up(torch.tensor([wrong]).numpy())


def test_embeddings_that_do_something_else_are_not_read() -> None:
    class Shifted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    assert describe_embedding(nn.Embedding(5, 4)) is not None
    assert describe_embedding(Shifted(5, 4)) is None
    assert describe_embedding(nn.Embedding(5, 4, max_norm=1.0)) is None
    assert describe_embedding(nn.Linear(5, 4)) is None
    hooked = nn.Embedding(5, 4)
    hooked.register_forward_hook(lambda *args: None)
    assert describe_embedding(hooked) is None
