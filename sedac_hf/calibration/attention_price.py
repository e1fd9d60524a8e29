"""What it costs to see how evenly a checkpoint's layer attends, on the pass that will run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from sedac_hf.core.attention_spread import Spread
from sedac_hf.core.row_pass import Placement
from sedac_hf.core.support import head_dim_of
from sedac_hf.errors import CacheError, NotNativeError

if TYPE_CHECKING:
    from sedac_hf.calibration.costs import CostModel
    from sedac_hf.calibration.documents import Document
    from sedac_hf.core.row_pass import RowPass
    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["attention_prices"]

# Turns of which the median counts.
_TURNS = 25


def attention_prices(
    model: SedacForCausalLM, documents: Sequence[Document], costs: CostModel
) -> list[float]:
    """The price at each checkpoint, at the length of an ordinary document.

    Measured where the other costs are: one token's step of the checkpoint's layer with and without
    it, in turns, the difference as a fraction of a whole step. Else by numbers read: the layer's
    keys once more.

    Args:
        model: A wrapped model.
        documents: Texts whose lengths are ordinary.
        costs: What probes, tries and exits cost; says how prices are taken.

    Returns:
        Fractions of a full pass, one for each checkpoint, at least 0; 0 at the embedding.
    """
    specs = model.config.checkpoint_specs()
    counted = _counted(model, documents, costs)
    found = [0.0 if spec.layer_idx < 0 else counted for spec in specs]
    if costs.source != "measured" or not any(found):
        return found
    text = sorted(documents, key=len)[len(documents) // 2]
    build = model.assembly.choices.best().build
    if build is None or len(text) < 2:
        return found
    model.assembly.prepare()
    try:
        timed = _Step(model, build(model.assembly.parts), text)
    except (CacheError, NotNativeError):
        return found
    return [0.0 if spec.layer_idx < 0 else timed.price(spec.layer_idx) for spec in specs]


def _counted(model: SedacForCausalLM, documents: Sequence[Document], costs: CostModel) -> float:
    """Bytes of one layer's keys, in units of those that a full pass reads."""
    config = model.base_lm.config.get_text_config()
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    length = float(np.median([len(document) for document in documents]))
    keys = length * shared * head_dim_of(config) * model.base_lm.dtype.itemsize
    # The probe's share tells how many bytes a full pass reads: its own are float32.
    return float(costs.checkpoints[0].probe * keys / (4.0 * model.config.probe_rank * width))


class _Step:
    """One token behind a text, run again and again."""

    @torch.no_grad()
    def __init__(self, model: SedacForCausalLM, run: RowPass, text: Document) -> None:
        shell = model.shell
        ids = torch.from_numpy(np.asarray(text.ids, np.int64))[None].to(shell.input_device)
        cache = DynamicCache(config=shell.base.config)
        shell.base(input_ids=ids[:, :-1], **shell.cached(cache))
        self._run, self._depth, self._last = run, shell.num_layers, ids[:, -1:].cpu()
        length = run.load(cache)
        self._at = Placement(
            np.zeros_like(length), length, length[:, None], np.ones((1, 1, 1), np.bool_)
        )

    @torch.no_grad()
    def price(self, layer: int) -> float:
        """Of seeing how evenly `layer` attends."""
        run, at = self._run, self._at
        embedded = run.embed(self._last, at.positions)
        hidden = run.layers(embedded, at, 0, layer) if layer > 0 else embedded
        calls: list[Callable[[], object]] = [
            lambda: run.layers(hidden, at, layer, layer + 1),
            lambda: run.layers(hidden, at, layer, layer + 1, spread=Spread()),
            lambda: run.best(run.layers(embedded, at, 0, self._depth)),
        ]
        seconds = np.empty((_TURNS + 1, len(calls)))
        for turn in seconds:
            for which, call in enumerate(calls):
                begun = time.perf_counter()
                call()
                turn[which] = time.perf_counter() - begun
        # The first turn warms up.
        plain, seen, whole = np.median(seconds[1:], axis=0).tolist()
        return max(0.0, float((seen - plain) / whole))
