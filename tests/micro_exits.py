"""The micro model with exits that work: a lens and a probe after its first layer.

Both are fitted within a second, so that tests can build good models, and spoil them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.probe_training import train_probe
from sedac_hf.config import CheckpointSpec
from sedac_hf.core.cascade_controller import CascadeConfig, LayerConfig
from sedac_hf.core.exit_heads import rms_normalise
from sedac_hf.modeling import SedacForCausalLM
from tests.micro_model import WIDTH, MicroLanguage, MicroModel

LAYER = 1
PROMPT = 8
# Share of the tokens whose exit is tried, and the probability from which it is taken.
SHARE, SURE = 0.6, 0.9
LENS_STEPS = 200


def micro_documents(language: MicroLanguage, count: int, *, seed: int) -> list[Document]:
    """Documents of the micro language whose first eight tokens are the prompt."""
    drawn = language.documents(count, seed=seed)
    return [Document(np.array(document.ids), PROMPT) for document in drawn]


def fitted_states(model: SedacForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States after the checkpoint's layer and after the last, `[tokens, width]` each."""
    shell = model.shell
    hidden, calls = shell.prologue(input_ids=ids, use_cache=False)
    early = hidden
    for layer in range(shell.num_layers):
        hidden = shell.layer(layer, hidden, calls[layer])
        if layer == LAYER:
            early = hidden
    return early.flatten(0, 1), hidden.flatten(0, 1)


@torch.no_grad()
def micro_exits(
    micro: MicroModel, *, base: PreTrainedModel | None = None, **values: Any
) -> SedacForCausalLM:
    """The micro model with one checkpoint at which about a quarter of the tokens leave.

    Almost all of these are words of chains, which are known so early, and perplexity rises by less
    than half a percent.

    Args:
        micro: The trained micro model.
        base: What to wrap; None for the micro model itself.
        **values: Further fields of the configuration.
    """
    spec = CheckpointSpec(LAYER, "lens", lens_rank=WIDTH)
    model = SedacForCausalLM.from_base(
        base or micro.model, [spec], with_threshold(1.0), probe_rank=8, **values
    )
    ids = torch.tensor([document.ids for document in micro.language.documents(200, seed=41)])
    early, last = fitted_states(model, ids)
    head: Any = model.exit_heads[0]
    fit_lens(model, head, early, last)
    full, exited = (
        model.shell.logits(states[None])[0].log_softmax(-1) for states in (last, head(early))
    )
    divergence = (full.exp() * (full - exited)).sum(-1)
    with torch.enable_grad():
        trained = train_probe(early, divergence, 8)
    model.probes.probes[0].load_state_dict(trained.state_dict())
    set_share(model, early, SHARE, probability=SURE)
    return model


def fit_lens(model: SedacForCausalLM, head: Any, early: Tensor, last: Tensor) -> None:
    """Least squares on the final states, then some steps on the divergence of what they say."""
    given = rms_normalise(early)
    solved = torch.linalg.lstsq(
        torch.cat([given, torch.ones_like(given[:, :1])], dim=1), last - early
    ).solution
    head.down.weight.copy_(torch.eye(WIDTH))
    head.up.weight.copy_(solved[:-1].T)
    head.up.bias.copy_(solved[-1])
    wanted = model.shell.logits(last[None])[0].log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        parameters = [p.requires_grad_() for p in head.parameters()]
        optimizer = torch.optim.Adam(parameters, 3e-3)
        for _ in range(LENS_STEPS):
            some = torch.randint(len(early), (512,), generator=generator)
            said = model.shell.logits(head(early[some])[None])[0].log_softmax(-1)
            loss = (wanted[some].exp() * (wanted[some] - said)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.requires_grad_(False)


def with_threshold(threshold: float, *, probability: float = 0.0) -> CascadeConfig:
    """Rules under which a risk of at most half the threshold leaves."""
    rule = LayerConfig(LAYER, threshold, decay=0.0, min_probability=probability)
    return CascadeConfig([rule])


@torch.no_grad()
def set_share(
    model: SedacForCausalLM, states: Tensor, share: float, *, probability: float = 0.0
) -> None:
    """Put the threshold where a share of these states tries to leave."""
    threshold = 2.0 * float(model.probes.risk(0, states).quantile(share))
    model.set_cascade(with_threshold(threshold, probability=probability))
