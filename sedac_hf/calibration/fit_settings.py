"""What `fit` is asked for, and what it says in the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sedac_hf.calibration.fusion_training import ModalityReport
from sedac_hf.calibration.head_schedule import HeadReport
from sedac_hf.calibration.probe_training import GateReport
from sedac_hf.config import CheckpointSpec
from sedac_hf.errors import CalibrationError

__all__ = ["FitReport", "FitSettings", "default_checkpoints"]


@dataclass(frozen=True)
class FitSettings:
    """What `fit` is asked for.

    Attributes:
        checkpoints: Checkpoints and their heads; None puts blocks with deep feedback on the
            embedding and after a sixth of the layers.
        costs: What exits are taken to cost: `"measured"` on this machine, or `"parameters"`:
            what decoding bound by memory would cost, alike everywhere.
        kv_mode: How K/V of exited tokens come about, `"settle"` or `"propagate"`.
        budget_seconds: Wall-clock time for everything.
        text_tokens: Most tokens that the base writes.
        max_length: Longest document made from given texts, in tokens.
        draft_words: Size of the draft vocabulary.
        probe_rank: Rank of the probes.
        storage: `"whole"`, `"delta"`, or `"auto"`: deltas where they cost less than a point of
            agreement.
        epsilon: Perplexity increase to certify, as a fraction.
        delta: Chance that the certificate may be wrong.
        learning_rate: Peak learning rate of heads; None takes `head_learning_rate` of the width.
        epochs: Passes of a head over the documents at most.
        seed: Seed of every draw.
    """

    checkpoints: tuple[CheckpointSpec, ...] | None = None
    costs: str = "measured"
    kv_mode: str = "settle"
    budget_seconds: float = 1200.0
    text_tokens: int = 1_000_000
    max_length: int = 256
    draft_words: int = 8192
    probe_rank: int = 64
    storage: str = "auto"
    epsilon: float = 0.01
    delta: float = 0.1
    learning_rate: float | None = None
    epochs: float = 12.0
    seed: int = 0


@dataclass
class FitReport:
    """What `fit` did and measured.

    Attributes:
        documents: Documents of each split.
        tokens: Tokens of all documents.
        train_tokens: Tokens of the documents that heads were trained on.
        written_tokens: Tokens of the documents that the base wrote itself.
        self_written: Whether the base wrote the texts that were chosen and tested on.
        heads: One report a head.
        gates: How well each gate works at each checkpoint, on documents it did not see.
        modalities: What each kind of evidence adds to each gate and what it costs.
        ablation: Each variant of the gates: its cost within the budget on documents that it was not
            searched on, its policy at the target, and whether it was chosen.
        probe_target: Which target the kept probes have.
        temperatures: What the logits of each exit are divided by.
        costs: What probes, tries and exits cost on this machine, as fractions of a plain step.
        storage: How each head is stored, and what the choice cost in agreement.
        seconds: Time of each stage, interrupted runs included.
        certificate: The certificate, as JSON values.
    """

    documents: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    train_tokens: int = 0
    written_tokens: int = 0
    self_written: bool = True
    heads: list[HeadReport] = field(default_factory=list)
    gates: list[GateReport] = field(default_factory=list)
    modalities: list[ModalityReport] = field(default_factory=list)
    ablation: list[dict[str, Any]] = field(default_factory=list)
    probe_target: str = "entropy"
    temperatures: list[float] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
    storage: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitReport:
        """A report from what `to_dict` gave."""
        heads = [HeadReport.from_dict(head) for head in values["heads"]]
        gates = [GateReport(**gate) for gate in values["gates"]]
        return cls(**{**values, "heads": heads, "gates": gates})


def default_checkpoints(num_layers: int) -> list[CheckpointSpec]:
    """Two block heads with deep feedback: on the embedding, and after a sixth of the layers.

    Deep feedback is worth more than depth: given the previous token's final state, a shallow block
    does what one many layers deeper does without it, and what is skipped is nearly everything.

    Args:
        num_layers: Decoder layers of the base.

    Returns:
        The checkpoints.

    Raises:
        CalibrationError: If the base has fewer than two layers.
    """
    if num_layers < 2:
        raise CalibrationError(
            f"the base has {num_layers} layer: there is nothing to skip, so no exits can be fitted"
        )
    second = min(max(round(num_layers / 6) - 1, 0), num_layers - 2)
    return [CheckpointSpec(layer_idx=place, feedback=True) for place in (-1, second)]
