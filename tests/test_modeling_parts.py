"""Parts that do not fit a wrapper are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.config import CheckpointSpec, SedacConfig
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.core.probe_inference import ProbeManager
from sedac_hf.errors import ConfigError, ModeError
from sedac_hf.modeling import SedacForCausalLM
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH, build_tiny, prompt
from tests.wrapping import rule, spec_of, wrap


def test_a_checkpoint_beyond_the_depth_is_refused(llama: PreTrainedModel) -> None:
    for layer in (LAYERS - 1, LAYERS, 40):
        with pytest.raises(ConfigError, match=f"after layer {layer} leaves nothing to skip"):
            SedacForCausalLM.from_base(llama, [spec_of(layer, "lens")])
    with pytest.raises(ConfigError, match="template_layer 9 does not exist"):
        SedacForCausalLM.from_base(llama, [CheckpointSpec(1, template_layer=9)])


def test_checkpoints_that_are_repeated_or_unordered_are_refused(llama: PreTrainedModel) -> None:
    for layers in ((1, 1), (2, 0)):
        specs = [spec_of(layer, "lens") for layer in layers]
        with pytest.raises(ConfigError, match="increasing order"):
            SedacForCausalLM.from_base(llama, specs)


def test_heads_and_probes_of_another_width_are_refused(llama: PreTrainedModel) -> None:
    spec = spec_of(1, "lens")
    with pytest.raises(ConfigError, match="probe after layer 1 works on states of width 48"):
        SedacForCausalLM.from_base(llama, [spec], probes=ProbeManager.build(1, 48, 4))
    wide = build_tiny("llama", hidden_size=48, intermediate_size=64)
    for kind in ("lens", "block"):
        heads = list(wrap(wide, {1: kind}).exit_heads)
        with pytest.raises(ConfigError, match="head after layer 1 works on states of width 48"):
            SedacForCausalLM.from_base(llama, [spec_of(1, kind)], heads=heads)


def test_a_number_of_parts_that_differs_is_refused(llama: PreTrainedModel) -> None:
    heads = list(wrap(llama, {1: "lens"}).exit_heads)
    specs = [spec_of(0, "lens"), spec_of(1, "lens")]
    with pytest.raises(ConfigError, match="one head and one probe for each checkpoint"):
        SedacForCausalLM.from_base(llama, specs, heads=heads)
    with pytest.raises(ConfigError, match="one head and one probe for each checkpoint"):
        SedacForCausalLM.from_base(llama, specs[1:], probes=ProbeManager.build(2, WIDTH, 4))


def test_a_cascade_for_other_checkpoints_is_refused(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    other = CascadeConfig([rule(2)])
    with pytest.raises(ConfigError, match=r"after layers \[2\], but the model has"):
        model.set_cascade(other)
    with pytest.raises(ConfigError, match=r"after layers \[2\]"), model.cascade_replaced(other):
        pass


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([3, 3]), "more than once"),
        (torch.tensor([3, VOCABULARY]), f"from 3 to {VOCABULARY}"),
        (torch.tensor([-1, 3]), "from -1 to 3"),
        (torch.tensor([3.0]), "int64"),
        (torch.tensor([], dtype=torch.long), "non-empty"),
    ],
)
def test_a_bad_draft_vocabulary_is_refused(
    llama: PreTrainedModel, tokens: Tensor, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(llama, {1: "lens"}, draft_vocabulary=tokens)


def test_exit_start_of_another_length_is_refused(llama: PreTrainedModel) -> None:
    model = wrap(llama, {1: "lens"})
    with pytest.raises(ConfigError, match="one per row"):
        model(prompt(3, 5), exits="simulate", exit_start=torch.tensor([1, 2]))
    cache = llama(prompt(1, 2)).past_key_values
    with pytest.raises(ModeError, match="takes no cache"):
        model(prompt(1, 5), exits="simulate", past_key_values=cache)


def test_a_configuration_without_a_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_config is missing"):
        SedacForCausalLM(SedacConfig())
