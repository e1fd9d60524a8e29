"""Do small errors in hidden states change what leaves and what is said?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedac_hf.calibration.work_sizes import most_logits
from sedac_hf.core.recorded_pass import RecordedPass
from sedac_hf.core.simulate import eligible_positions, settled_states, simulate
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation.scoring import length_batches, padded
from sedac_hf.testing.noise import NoisyPass
from sedac_hf.testing.outcome import TestOutcome

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.core.decoder_loop import ExitParts
    from sedac_hf.testing.suite_input import SuiteInput

__all__ = ["NoiseLevel", "RobustnessOutcome", "RobustnessTest"]

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NoiseLevel:
    """What noise of one strength did; shares are of decode positions.

    Attributes:
        strength: Size of the noise, as a fraction of a state's root mean square.
        decisions: Share at which the token leaves after the same layer as without noise.
        tokens: Share at which the most probable next token is the same as without noise.
        baseline_tokens: The same of the base at full depth under the same noise.
        exits_kept: Of the positions that leave with or without noise, the share that leaves after
            the same layer in both; None where nothing leaves.
    """

    strength: float
    decisions: float
    tokens: float
    baseline_tokens: float
    exits_kept: float | None


@dataclass(frozen=True, kw_only=True)
class RobustnessOutcome(TestOutcome):
    """Consistency under noise.

    Attributes:
        levels: One entry for each strength, in the order of the configuration.
        consistency: The least of all shares of decisions and tokens.
        positions: Decode positions that were compared.
        exit_share: Share of them that left without noise.
    """

    levels: tuple[NoiseLevel, ...]
    consistency: float
    positions: int
    exit_share: float

    def details(self) -> list[tuple[str, str]]:
        """One line for each strength."""
        return [
            (
                f"noise of {level.strength:.2%}",
                f"{level.decisions:.1%} of decisions, {level.tokens:.1%} of tokens "
                f"({level.baseline_tokens:.1%} at full depth)",
            )
            for level in self.levels
        ]


class RobustnessTest:
    """Decisions and tokens stay the same for more than `min_consistency` of the positions.

    Noise is added to the hidden states at the checkpoints, see `NoisyPass`: for each strength the
    documents run once more, with the same random numbers. Every position after a prompt follows the
    exit rule of generation. For each strength two shares are taken over all decode positions of all
    documents: those where the token leaves after the same layer as without noise (full depth
    counts as a layer), and those where the most probable next token is the same. The statistic is
    the least of these shares over all strengths. The base's own share of equal tokens under the
    same noise stands beside it: noise goes on into the deeper layers, and what it changes there is
    not the exits' doing.

    Skipped where exits are not final.
    """

    name = "robustness"

    def run(self, given: SuiteInput) -> TestOutcome:
        """Measure.

        Args:
            given: Models, texts and limits.
        """
        config = given.config
        limit = config.min_consistency
        criterion = f"more than {limit:.0%} of decisions and tokens stay the same under noise"
        if not given.exits_act:
            return TestOutcome(
                name=self.name, passed=None, criterion=criterion, found=given.why_no_exits
            )
        picks = _spread(given.documents, config.noise_documents)
        counts, positions, left = _count(given, picks)
        if not positions:
            raise CalibrationError(
                f"none of {len(picks)} documents has a token after the first of its continuation; "
                "give longer texts."
            )
        pairs = zip(config.noise_levels, counts, strict=True)
        levels = tuple(_level(strength, row, positions) for strength, row in pairs)
        consistency = min(min(level.decisions, level.tokens) for level in levels)
        return RobustnessOutcome(
            name=self.name,
            passed=consistency > limit,
            criterion=criterion,
            found=f"{consistency:.1%} at worst",
            notes=_notes(levels, limit),
            levels=levels,
            consistency=consistency,
            positions=positions,
            exit_share=left / positions,
        )


def _spread(documents: Sequence[Document], most: int) -> list[Document]:
    """Evenly spaced documents, so that every domain has its share."""
    picks = np.linspace(0, len(documents) - 1, min(most, len(documents))).round().astype(int)
    return [documents[i] for i in np.unique(picks)]


def _level(strength: float, counts: Counts, positions: int) -> NoiseLevel:
    decisions, tokens, full, kept, either = counts.tolist()
    return NoiseLevel(
        strength,
        decisions / positions,
        tokens / positions,
        full / positions,
        kept / either if either else None,
    )


def _notes(levels: Sequence[NoiseLevel], limit: float) -> tuple[str, ...]:
    notes = []
    for level in levels:
        if level.exits_kept is not None and level.exits_kept <= limit:
            notes.append(
                f"noise of {level.strength:.2%}: of the tokens that leave with or without it, "
                f"{level.exits_kept:.0%} do so in both."
            )
        if level.baseline_tokens <= limit:
            notes.append(
                f"noise of {level.strength:.2%} changes {1 - level.baseline_tokens:.0%} of the "
                "tokens at full depth too: that is the base's doing."
            )
    return tuple(notes)


@torch.inference_mode()
def _count(given: SuiteInput, documents: Sequence[Document]) -> tuple[Counts, int, int]:
    """For each strength what stayed the same, `[strengths, 5]`; positions; how many left."""
    model, config = given.model, given.config
    model.assembly.prepare()
    levels = config.noise_levels
    counts, positions, left = np.zeros((len(levels), 5), np.int64), 0, 0
    vocabulary = int(model.config.get_text_config().vocab_size)
    budget = config.batch_tokens or max(1, most_logits(model.device) // vocabulary)
    for index, group in enumerate(length_batches(documents, budget)):
        batch = _Batch(given, [documents[i] for i in group], config.seed + index)
        clean = batch.read(0.0)
        positions += len(clean.layers)
        left += int(clean.left.sum())
        for row, strength in enumerate(levels):
            counts[row] += clean.same(batch.read(strength))
    return counts, positions, left


@dataclass(frozen=True)
class _Reading:
    """What every decode position of a batch did, `[positions]` each."""

    layers: npt.NDArray[np.int64]
    left: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    full_tokens: npt.NDArray[np.int64]

    def same(self, other: _Reading) -> list[int]:
        """Equal decisions, tokens, full-depth tokens, exits; positions that left in either."""
        decisions = self.layers == other.layers
        return [
            int(decisions.sum()),
            int((self.tokens == other.tokens).sum()),
            int((self.full_tokens == other.full_tokens).sum()),
            int((decisions & self.left).sum()),
            int((self.left | other.left).sum()),
        ]


class _Batch:
    """Some documents that are read again and again, with noise of different strength."""

    def __init__(self, given: SuiteInput, documents: Sequence[Document], seed: int) -> None:
        self._model = given.model
        self._seed = seed
        ids, mask = padded(documents)
        starts = [max(document.prompt_length, 1) for document in documents]
        self._start = torch.tensor(starts)
        self._eligible = eligible_positions((ids.shape[0], ids.shape[1]), self._start, mask)
        device = given.model.device
        self._arguments: dict[str, Any] = {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
        }

    def read(self, strength: float) -> _Reading:
        """Let every position decide and speak."""
        assembly, cascade = self._model.assembly, self._model.cascade
        assert cascade is not None
        controller = assembly.controller(cascade)
        settles = self._model.config.kv_mode == "settle" and not cascade.is_soft
        recorded = RecordedPass.record(
            self._parts(strength), self._arguments, controller.attentive if settles else ()
        )
        if settles:
            trace, states = settled_states(
                self._parts(strength), controller, recorded, self._arguments, self._eligible
            )
            layers, tokens = trace.layers, self._tokens(states)
        else:
            found = simulate(self._parts(strength), controller, self._arguments, self._start)
            layers, logits = np.asarray(found.exit_layers), cast(Tensor, found.logits)
            if found.soft_exits is not None:
                places = np.array([*cascade.layer_indices, self._model.shell.num_layers])
                layers = places[np.asarray(found.soft_exits)]  # -1 picks the last: full width
            chosen = torch.from_numpy(self._eligible).to(logits.device)
            tokens = logits[chosen].argmax(-1).cpu().numpy()
        layers = layers[self._eligible]
        left = layers < self._model.shell.num_layers
        return _Reading(layers, left, tokens, self._tokens(recorded.final))

    def _parts(self, strength: float) -> ExitParts:
        assembly = self._model.assembly
        checkpoints = [head.layer_idx for head in assembly.parts.heads]
        cascade = self._model.cascade
        soft = cascade is not None and cascade.is_soft
        narrow = assembly.prepare_narrow() if soft else None
        passes = NoisyPass(
            self._model.shell, assembly.fill, checkpoints, strength, self._seed, narrow
        )
        return replace(assembly.parts, passes=passes)

    def _tokens(self, states: Tensor) -> npt.NDArray[np.int64]:
        """The most probable next token of every decode position."""
        shell = self._model.shell
        picked = states[torch.from_numpy(self._eligible).to(states.device)]
        size = max(1, most_logits(states.device) // shell.vocabulary_size)
        found = [
            shell.logits(picked[at : at + size].unsqueeze(0)).squeeze(0).argmax(-1).cpu().numpy()
            for at in range(0, len(picked), size)
        ]
        return np.concatenate([np.zeros(0, np.int64), *found])
