"""How evenly tokens attend in one layer, worked out beside the base's own attention.

A layer is run as a shallow copy whose attention goes through a function of ours. That function
calls the base's own for the output, which so keeps its bits, and works out the entropy of the
weights besides. The base and its configuration are never changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sedac_hf.core.stand_ins import shallow_copy

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell

__all__ = ["Spread", "spread_of", "spread_reason"]

# What decoder layers of transformers call their attention.
_ATTENTION_NAMES: Final = ("self_attn", "attn", "attention", "self_attention")
_PREFIX: Final = "sedac_observed_"
# Scores that are held at once: 64 MB in float32.
_MAX_SCORES = 1 << 24
# What layers raise whose attention takes no function of ours.
_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)

# Attention calls of the running layer: their spreads, `[rows, n]` each.
_CALLS: ContextVar[list[Tensor] | None] = ContextVar("sedac_attention_calls", default=None)


class Spread:
    """Takes the attention spread of the last layer of one run of layers.

    Attributes:
        risk: Mean over query heads of ``H(weights) / ln(visible keys)``, `[rows, n]`, float32, a
            lone key counting as two; None where no layer was run or it cannot be told.
    """

    __slots__ = ("risk",)

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.risk: Tensor | None = None

    @property
    def last(self) -> Tensor | None:
        """That of the last position of each row, `[rows]`."""
        return None if self.risk is None else self.risk[:, -1]

    @property
    def flat(self) -> Tensor | None:
        """All of them, one row after the other, `[rows * n]`."""
        return None if self.risk is None else self.risk.reshape(-1)

    def run(self, layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call a layer and keep its attention spread.

        Args:
            layer: A decoder layer, or a shallow copy of one.
            hidden: States `[rows, n, width]`.
            *args: What else the layer is given.
            **kwargs: Likewise.

        Returns:
            What the layer returns, bit for bit.
        """
        observed = _observed(layer)
        if observed is None:
            return layer(hidden, *args, **kwargs)
        calls: list[Tensor] = []
        token = _CALLS.set(calls)
        try:
            output = observed(hidden, *args, **kwargs)
        finally:
            _CALLS.reset(token)
        # More than one attention (to other texts, say) is not what the gates were taught.
        self.risk = calls[0] if len(calls) == 1 else None
        return output


@torch.no_grad()
def spread_reason(shell: BaseShell, layer: int) -> str | None:
    """Why the attention spread of a layer cannot be had, or None when it can.

    Args:
        shell: Shell of the base.
        layer: The layer; -1 is the embedding.
    """
    name = type(shell.base).__name__
    if layer < 0:
        return "The embedding attends to nothing."
    ids = torch.arange(1, 5, device=shell.input_device)[None] % shell.vocabulary_size
    hidden, calls = shell.prologue(input_ids=ids, use_cache=False)
    found, call = Spread(), calls[layer]
    try:
        output = found.run(shell.layer_list[layer], hidden, *call.args, **call.kwargs)
    except _ERRORS as error:
        return f"The attention of {name} takes no function in place of its own: {error}"
    if found.risk is None:
        return f"{name} does not attend by way of transformers' attention interface."
    output = output[0] if isinstance(output, tuple) else output
    if not torch.isfinite(found.risk).all():
        kind = shell.base.config._attn_implementation
        return f"The masks that {name} makes for the attention {kind!r} cannot be read."
    if not torch.equal(output, shell.layer(layer, hidden, call)):
        return f"{name} attends otherwise by a function in place of its own."
    return None


def spread_of(
    query: Tensor,
    key: Tensor,
    visible: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mean over heads of ``H(softmax(scores)) / ln(max(visible keys, 2))``.

    Args:
        query: Queries `[rows, heads, n, dim]`.
        key: Keys `[rows, key heads, keys, dim]`; each serves as many query heads in a row.
        visible: Which keys each query sees, broadcastable to `[rows, heads, n, keys]`; None if all.
        scaling: What products are multiplied by; None is ``dim ** -0.5``.
        softcap: Bound that products are softly kept under.
        bias: Added to the scores, broadcastable likewise.
        sinks: A score of each head that takes weight and is no key, `[heads]`.

    Returns:
        `[rows, n]`, float32; NaN for a query that sees nothing.
    """
    rows, heads, count, dim = query.shape
    groups = key.shape[1]
    keys = key.float().transpose(-1, -2)
    scale = dim**-0.5 if scaling is None else scaling
    chunk = max(1, _MAX_SCORES // max(1, rows * heads * key.shape[2]))
    found = []
    for start in range(0, count, chunk):
        part = query[:, :, start : start + chunk].float()
        grouped = part.reshape(rows, groups, -1, dim)
        scores = (grouped @ keys).view(rows, heads, part.shape[2], -1) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + _rows_of(bias, start, chunk).float()
        seen = None if visible is None else _rows_of(visible, start, chunk)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            own = sinks.float().view(1, -1, 1, 1).expand(rows, -1, part.shape[2], 1)
            weights = torch.cat([scores, own], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        found.append(_evenness(weights, seen))
    return torch.cat(found, dim=-1)


def _evenness(weights: Tensor, seen: Tensor | None) -> Tensor:
    """From weights `[rows, heads, n, keys]` to the mean share of the greatest entropy."""
    entropy = torch.special.entr(weights).sum(-1)
    if seen is None:
        return cast(Tensor, entropy.mean(1) / math.log(max(weights.shape[-1], 2)))
    keys = seen.sum(-1).clamp_min(2).float().log()
    return cast(Tensor, (entropy / keys).mean(1))


def _rows_of(table: Tensor, start: int, count: int) -> Tensor:
    """Some queries of a table broadcastable to `[rows, heads, n, keys]`."""
    return table if table.shape[-2] == 1 else table[..., start : start + count, :]


def _observed(layer: Any) -> Any:
    """A copy of a layer that tells of its attention; None where there is none to be found."""
    for name in _ATTENTION_NAMES:
        attention = getattr(layer, name, None)
        config = getattr(attention, "config", None)
        kind = getattr(config, "_attn_implementation", None)
        if isinstance(attention, nn.Module) and isinstance(kind, str):
            own = object.__new__(type(config))
            # The setter of the field would reach into configurations that the copy shares.
            own.__dict__.update(config.__dict__, _attn_implementation_internal=_registered(kind))
            copy = shallow_copy(attention, {"config": own, "observed": attention})
            return shallow_copy(layer, {name: copy})
    return None


def _registered(kind: str) -> str:
    """Name under which the observing counterpart of an attention is known to transformers."""
    # The kind stays in the name: layers ask for "flash" in it.
    name = _PREFIX + kind
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _observing(kind))
        if kind in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name


def _observing(kind: str) -> Callable[..., Any]:
    """The attention `kind` with an eye on its weights."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        real = module.__dict__["observed"]
        output = _own_function(real, kind)(real, query, key, value, attention_mask, **kwargs)
        calls = _CALLS.get()
        if calls is not None:
            weights = output[1] if isinstance(output, tuple) else None
            with torch.no_grad():
                calls.append(_seen(real, kind, query, key, attention_mask, weights, kwargs))
        return output

    return attend


def _own_function(attention: nn.Module, kind: str) -> Callable[..., Any]:
    """What the module itself would call."""
    forward: Any = inspect.unwrap(type(attention).forward)
    names = [n for n in forward.__code__.co_names if n.endswith("eager_attention_forward")]
    eager = forward.__globals__.get(names[0]) if names else None
    interface: Any = forward.__globals__.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return cast(Callable[..., Any], interface.get_interface(kind, eager))


def _seen(
    attention: nn.Module,
    kind: str,
    query: Tensor,
    key: Tensor,
    mask: Any,
    weights: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The spread of one call, `[rows, n]`; NaN where its mask cannot be read."""
    count, keys = query.shape[2], key.shape[2]
    given = kwargs.get("is_causal")
    causal = bool(getattr(attention, "is_causal", True) if given is None else given)
    if kwargs.get("cu_seq_lens_q") is not None or not (
        mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 4))
    ):
        return query.new_full((query.shape[0], count), math.nan, dtype=torch.float32)
    window = kwargs.get("sliding_window") if "flash" in kind else None
    if weights is not None:
        # Where weights come out nothing but the mask has hidden keys.
        visible, _ = _by_mask(mask, keys)
        return _evenness(weights.float(), visible)
    bias: Tensor | None = kwargs.get("position_bias")
    visible, added = _by_mask(mask, keys)
    if mask is None or mask.dim() == 2:
        ahead = keys - count if "flash" in kind else 0
        order = _by_order(count, keys, ahead, causal and count > 1, window, query.device)
        visible = order if visible is None else visible & order
    if added is not None:
        bias = added if bias is None else bias + added
    sinks = kwargs.get("s_aux", kwargs.get("sinks"))
    return spread_of(
        query, key, visible, scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap"),
        bias=bias, sinks=sinks if isinstance(sinks, Tensor) else None,
    )  # fmt: skip


def _by_mask(mask: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys that a mask lets be seen, and what it adds to the scores."""
    if mask is None:
        return None, None
    mask = mask[..., :keys]
    if mask.dim() == 2:
        return mask.bool()[:, None, None, :], None
    if mask.dtype == torch.bool:
        return mask, None
    # Masks hide by the lowest number, or by what comes of adding two of them.
    return mask > torch.finfo(mask.dtype).min / 2, mask


def _by_order(
    count: int, keys: int, ahead: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Keys that queries see by their order alone, `[1, 1, n, keys]`."""
    shape = (count, keys)
    seen = torch.ones(shape, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(ahead)
    if window is not None:
        seen &= torch.ones(shape, dtype=torch.bool, device=device).triu(ahead - window + 1)
    return seen[None, None]
