"""Checkpoints and configuration: what is refused, and the way to JSON and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from sedac_hf.config import CheckpointSpec, SedacConfig
from sedac_hf.errors import ConfigError, SedacError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_idx": -2}, "-1 .the embedding. or more"),
        ({"layer_idx": 1.5}, "layer_idx must be an int"),
        ({"layer_idx": True}, "layer_idx must be an int"),
        ({"head": "mlp"}, "head must be one of"),
        ({"storage": "int4"}, "storage must be one of"),
        ({"num_layers": 0}, "num_layers must be 1 or 2"),
        ({"num_layers": 3}, "num_layers must be 1 or 2"),
        ({"template_layer": -2}, "template_layer must be -1"),
        ({"head": "lens", "feedback": True}, "belong to block heads only"),
        ({"head": "lens", "storage": "delta", "delta_rank": 4}, "belong to block heads only"),
        ({"head": "lens", "lens_rank": 0}, "lens_rank must be at least 1"),
        ({"storage": "delta"}, "delta_rank must be positive"),
        ({"delta_rank": 4}, "delta_rank must be positive with storage 'delta' and 0 otherwise"),
    ],
)
def test_bad_checkpoints_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointSpec(**{"layer_idx": 1, **values})


def test_a_checkpoint_goes_to_json_and_back() -> None:
    spec = CheckpointSpec(3, "block", 2, True, "delta", 16, template_layer=5)
    assert CheckpointSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match=r"unknown fields \['colour'\].*upgrade"):
        CheckpointSpec.from_dict({**spec.to_dict(), "colour": 1})
    with pytest.raises(ConfigError, match="no layer_idx"):
        CheckpointSpec.from_dict({"head": "lens"})


def test_the_template_is_the_last_layer_by_default() -> None:
    assert CheckpointSpec(1).resolved(8).template_layer == 7
    assert CheckpointSpec(1, template_layer=3).resolved(8).template_layer == 3
    assert CheckpointSpec(6).resolved(8).layer_idx == 6
    with pytest.raises(ConfigError, match="at most 6"):
        CheckpointSpec(7).resolved(8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "fast"}, "mode must be one of"),
        ({"probe_target": "loss"}, "probe_target must be one of"),
        ({"strategy": "hopeful"}, "strategy must be one of"),
        ({"kv_mode": "copy"}, "kv_mode must be one of"),
        ({"probe_rank": 0}, "probe_rank must be at least 1"),
        ({"checkpoints": [{"layer_idx": 2}, {"layer_idx": 2}]}, "increasing order"),
        ({"checkpoints": [{"layer_idx": 1, "head": "x"}]}, "head must be one of"),
    ],
)
def test_bad_configurations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SedacConfig(**values)


def test_a_configuration_goes_to_disk_and_back(llama: PreTrainedModel, tmp_path: Any) -> None:
    config = SedacConfig.from_base_config(
        llama.config,
        checkpoints=[CheckpointSpec(1).to_dict()],
        base_model_name_or_path="org/base",
        certified_dtypes=["bfloat16"],
        dtype=torch.float32,
        mode="exact",
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, SedacConfig)
    assert again.checkpoint_specs() == [CheckpointSpec(1)]
    assert (again.mode, again.base_model_name_or_path) == ("exact", "org/base")
    assert again.certified_dtypes == ["bfloat16"]
    assert again.get_text_config().num_hidden_layers == llama.config.num_hidden_layers
    assert again.get_text_config(decoder=True).vocab_size == llama.config.vocab_size


@pytest.mark.parametrize("name", ["mixtral", "llama", "gemma2"])
def test_building_it_leaves_the_live_configuration_alone(name: str) -> None:
    from tests.tiny_models import build_tiny

    base = build_tiny(name)
    before = (base.config._attn_implementation, base.config._experts_implementation)
    config = SedacConfig.from_base_config(base.config)
    assert config.text_config is base.config
    assert (base.config._attn_implementation, base.config._experts_implementation) == before
    assert config._attn_implementation == before[0]


def test_errors_share_a_parent() -> None:
    import sedac_hf.errors as errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), SedacError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.BaseNotFoundError, FileNotFoundError)


@pytest.mark.parametrize("hits", [[[0.5, 0.6, 0.7]], [[0.5, 0.6, 0.7, 1.2]], [], [[0.1] * 4] * 2])
def test_hits_that_do_not_fit_the_checkpoints_are_refused(hits: list[list[float]]) -> None:
    spec = CheckpointSpec(1).to_dict()
    with pytest.raises(ConfigError, match="four rates between 0 and 1 for each of 1 checkpoints"):
        SedacConfig(checkpoints=[spec], head_hits=hits)
    assert SedacConfig(checkpoints=[spec], head_hits=[[0.1, 0.2, 0.3, 0.4]]).head_hits
