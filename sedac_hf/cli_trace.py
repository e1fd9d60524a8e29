"""Text as it is generated, each token coloured by the depth at which it left the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.style import Style
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from sedac_hf.core.session import StepRecord, active_session

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM

__all__ = ["TraceStreamer", "TracedToken", "depth_style", "legend"]

# From the shallowest exit to the deepest; what went through every layer keeps the plain colour.
_EARLY, _LATE = (0, 215, 95), (255, 175, 0)
# Accepted drafts of exact mode, which all went through every layer.
_DRAFTS = {"head": Style(color="cyan", bold=True), "lookup": Style(color="magenta", bold=True)}
# Decoded text that ends so is waiting for the rest of a character.
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class TracedToken:
    """One generated token.

    Attributes:
        text: What it added to the text; empty while a character is unfinished.
        layer: 0-based layer after which it left; the number of layers when it did not leave.
        risk: Risk at the last checkpoint it came to, None if it came to none.
        confidence: Normalised confidence there, None if it came to none.
        draft: Who drafted it in exact mode: `"head"` or `"lookup"`; None when nobody did.
    """

    text: str
    layer: int
    risk: float | None
    confidence: float | None
    draft: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The token as plain JSON values."""
        return asdict(self)


def depth_style(layer: int, depth: int) -> Style:
    """The colour of a token that left after `layer` of `depth` layers."""
    if layer >= depth:
        return Style()
    share = min(max((layer + 1) / depth, 0.0), 1.0)
    red, green, blue = (
        round(early + share * (late - early)) for early, late in zip(_EARLY, _LATE, strict=True)
    )
    return Style(color=f"rgb({red},{green},{blue})", bold=True)


def legend(
    layers: Sequence[int],
    checkpoints: Sequence[int],
    depth: int,
    drafts: Sequence[str | None] = (),
) -> Text:
    """One line that explains the colours and counts the tokens of each depth.

    Args:
        layers: Layer at which each token left.
        checkpoints: Layers at which a token may leave.
        depth: Layers of the base.
        drafts: Who drafted each token; where anybody did, drafts are counted instead of exits.
    """
    line = Text()
    if any(drafts):
        for name, style in _DRAFTS.items():
            words = "drafted by an exit" if name == "head" else "found in the text"
            line.append(f"■ {words}: {list(drafts).count(name)}  ", style)
        return line.append(f"■ the base alone: {list(drafts).count(None)}")
    for layer in checkpoints:
        name = "embedding" if layer < 0 else f"layer {layer}"
        line.append(f"■ {name}: {list(layers).count(layer)}  ", depth_style(layer, depth))
    line.append(f"■ all {depth} layers: {sum(layer >= depth for layer in layers)}")
    return line


class TraceStreamer(BaseStreamer):
    """Writes text while it is generated, and keeps what is known of each token.

    One row only. A token whose bytes do not complete a character yet is shown together with the one
    that does.
    """

    def __init__(
        self,
        model: SedacForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        console: Console | None,
        *,
        colour: bool = True,
    ) -> None:
        """Get ready for one call of `generate`.

        Args:
            model: The model that generates.
            tokenizer: Turns ids into text.
            console: Where to write; None only records.
            colour: Whether to colour by depth.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._console = console
        self._colour = colour
        self._prompt_seen = False
        self._ids: list[int] = []
        self._shown = 0
        self.tokens: list[TracedToken] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self._ids.append(token)
            text = self._decoded()
            fresh = "" if text.endswith(_UNFINISHED) else text[self._shown :]
            self._shown += len(fresh)
            self._take(fresh)
            if fresh.endswith("\n"):
                # decoding starts anew at a line, so that long texts stay linear
                self._ids, self._shown = [], 0

    def end(self) -> None:
        """Show what is left, unfinished characters included, and end the line."""
        if self._console is not None:
            self._console.print(Text(self._decoded()[self._shown :]), soft_wrap=True)

    @property
    def text(self) -> str:
        """All text that was shown."""
        return "".join(token.text for token in self.tokens)

    @property
    def layers(self) -> list[int]:
        """Layer at which each token left."""
        return [token.layer for token in self.tokens]

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _take(self, fresh: str) -> None:
        depth = self._model.exit_stats.depth
        session = active_session(self._model)
        record = session.records[-1] if session is not None and session.records else None
        layer = depth if record is None else int(record.layers[0])
        origins = [] if session is None else session.origins[len(self.tokens) :][:1]
        draft = next((origin for origin in origins if origin in _DRAFTS), None)
        self.tokens.append(TracedToken(fresh, layer, *_risk_and_confidence(record), draft))
        if self._console is not None and fresh:
            style = depth_style(layer, depth) if draft is None else _DRAFTS[draft]
            style = style if self._colour else Style()
            self._console.print(Text(fresh, style), end="", soft_wrap=True)


def _risk_and_confidence(record: StepRecord | None) -> tuple[float | None, float | None]:
    if record is None:
        return None, None
    risk, confidence = float(record.risk[0]), float(record.confidence[0])
    known = risk == risk  # NaN where the token came to no checkpoint
    return (risk, confidence) if known else (None, None)
