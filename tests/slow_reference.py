"""An independent, slow reference: each architecture's forward written out by hand.

No cache, no shell, no proxy: the whole sequence goes through the base's modules layer by layer
with masks made here, positions that have left keep their state, and K/V come from the projections.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Called with the checkpoint's index and the states `[rows, seq, width]`; says who leaves.
Decide = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Walk:
    """What the reference found.

    Attributes:
        logits: `[rows, seq, vocabulary]`.
        outputs: State of each position before the final norm.
        layers: Exit layer of each position `[rows, seq]`, the depth where it stayed.
        keys: K of each layer, `[rows, heads, seq, head_dim]`.
        values: V of each layer.
        inputs: State that went into each layer.
    """

    logits: Tensor
    outputs: Tensor
    layers: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


class SlowReference:
    """One architecture, spelled out."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base: Any = base
        self.config: Any = base.config
        self.kind: str = base.config.model_type.removesuffix("_text")
        decoder = {"gpt2": "transformer", "falcon": "transformer", "gpt_neox": "gpt_neox"}
        self.decoder: Any = getattr(base, decoder.get(self.kind, "model"))
        if self.kind == "opt":
            self.decoder = self.decoder.decoder
        layers = {"gpt2": "h", "falcon": "h"}
        self.layers: Any = getattr(self.decoder, layers.get(self.kind, "layers"))

    @torch.no_grad()
    def walk(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        checkpoints: dict[int, Callable[[Tensor, dict[str, Any]], Tensor]] | None = None,
        decide: Decide | None = None,
    ) -> Walk:
        """Run whole sequences.

        Args:
            ids: `[rows, seq]`.
            mask: 1 for tokens, 0 for left padding, `[rows, seq]`; None without padding.
            checkpoints: Layer index -> head; heads get states and the arguments of the last layer.
            decide: Who leaves at a checkpoint: index, states, exit states -> `[rows, seq]` of bool.
        """
        rows, seq = ids.shape
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = self._embed(ids, positions)
        found = Walk(hidden, hidden, torch.full((rows, seq), len(self.layers)))
        left = torch.zeros((rows, seq), dtype=torch.bool)
        exits = torch.zeros_like(hidden)
        order = sorted(checkpoints or {})
        for i, layer in enumerate(self.layers):
            arguments = self._arguments(i, hidden, positions, mask)
            key, value = self._kv(i, layer, hidden, arguments)
            found.keys.append(key)
            found.values.append(value)
            found.inputs.append(hidden)
            out = self._run(layer, hidden, arguments)
            hidden = torch.where(left[..., None], hidden, out)
            if checkpoints and decide and i in checkpoints:
                last = self._arguments(len(self.layers) - 1, hidden, positions, mask)
                exit_states = checkpoints[i](hidden, last)
                now = decide(order.index(i), hidden, exit_states) & ~left
                exits = torch.where(now[..., None], exit_states, exits)
                found.layers[now] = i
                left = left | now
        found.outputs = torch.where(left[..., None], exits, hidden)
        found.logits = self.logits(found.outputs)
        return found

    def run_fresh(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run a layer that is not the base's, such as an exit block's."""
        return self._run(layer, hidden, arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head, soft-cap."""
        if self.kind in ("gpt2", "falcon"):
            return self.base.lm_head(self.decoder.ln_f(hidden))
        if self.kind == "gpt_neox":
            return self.base.lm_head(self.decoder.final_layer_norm(hidden))
        if self.kind == "opt":
            return self.base.lm_head(
                self.decoder.project_out(self.decoder.final_layer_norm(hidden))
            )
        logits = self.base.lm_head(self.decoder.norm(hidden))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.kind == "gpt2":
            return self.decoder.wte(ids) + self.decoder.wpe(positions)
        if self.kind == "gpt_neox":
            return self.decoder.embed_in(ids)
        if self.kind == "falcon":
            return self.decoder.word_embeddings(ids)
        if self.kind == "opt":
            table = self.decoder.embed_positions.weight
            return self.decoder.project_in(self.decoder.embed_tokens(ids)) + table[positions + 2]
        return self.decoder.embed_tokens(ids)

    def _arguments(self, i: int, hidden: Tensor, positions: Tensor, mask: Tensor) -> dict[str, Any]:
        """Mask, positions and rotary tables of layer `i`."""
        seq = hidden.shape[1]
        row, column = torch.arange(seq)[:, None], torch.arange(seq)[None, :]
        seen = (column <= row)[None] & (mask[:, None, :] != 0)
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        slides = types[i] == "sliding_attention" if types else self.kind == "mistral"
        if window is not None and slides:
            seen = seen & (column > row - window)[None]
        # A padded position sees itself, so that nothing becomes NaN.
        seen = seen | torch.eye(seq, dtype=torch.bool)[None]
        found: dict[str, Any] = {
            "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None],
            "position_ids": positions,
        }
        if self.kind == "gemma3":
            found["position_embeddings"] = self.decoder.rotary_emb(hidden, positions, types[i])
        elif self.kind not in ("gpt2", "opt"):
            found["position_embeddings"] = self.decoder.rotary_emb(hidden, positions)
        return found

    def _run(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.kind == "gpt2":
            return layer(hidden, None, arguments["attention_mask"], None)
        if self.kind == "falcon":
            return layer(hidden, alibi=None, **arguments)[0]
        return layer(hidden, **arguments)

    def _kv(
        self, i: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """K and V of a layer from its projections."""
        rows, seq, width = hidden.shape
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or width // heads
        if self.kind == "gpt2":
            _, key, value = layer.attn.c_attn(layer.ln_1(hidden)).split(width, dim=2)
        elif self.kind == "gpt_neox":
            fused = layer.attention.query_key_value(layer.input_layernorm(hidden))
            fused = fused.view(rows, seq, heads, 3, size)
            key, value = fused[..., 1, :], fused[..., 2, :]
        elif self.kind == "falcon":
            fused = layer.self_attention.query_key_value(layer.input_layernorm(hidden))
            fused = fused.view(rows, seq, heads + 2, size)
            key, value = fused[:, :, heads], fused[:, :, heads + 1]
        elif self.kind == "opt":
            normed = layer.self_attn_layer_norm(hidden)
            key, value = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
        elif self.kind == "phi3":
            groups = self.config.num_key_value_heads * size
            fused = layer.self_attn.qkv_proj(layer.input_layernorm(hidden))
            key, value = fused[..., heads * size :].split(groups, dim=-1)
        else:
            normed = hidden if self.kind == "olmo2" else layer.input_layernorm(hidden)
            key, value = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
            if self.kind == "olmo2":
                key = layer.self_attn.k_norm(key)
            if self.kind in ("qwen3", "gemma3"):
                key = layer.self_attn.k_norm(key.view(rows, seq, -1, size))
        key = key.reshape(rows, seq, -1, size).transpose(1, 2)
        value = value.reshape(rows, seq, -1, size).transpose(1, 2)
        if self.kind == "smollm3" and not self.config.no_rope_layers[i]:
            return key, value
        if "position_embeddings" in arguments:
            home: Any = sys.modules[type(layer).__module__]
            key = home.apply_rotary_pos_emb(key, key, *arguments["position_embeddings"])[1]
        return key, value
