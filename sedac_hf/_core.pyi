"""The compiled core of sedac_hf. Arrays are C-contiguous unless said otherwise."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

__version__: str

LOOKUP_SPAN: tuple[int, int]
"""Fewest and most of a text's last tokens that drafts from the text go by."""

def kernel() -> str:
    """Instruction set that the probes use on this processor: "avx2+fma", "neon" or "portable"."""

def batch_confidence_accumulate(
    previous: FloatArray,
    risk: FloatArray,
    tau: float,
    weight: float,
    gamma: float,
    out: FloatArray | None = None,
) -> FloatArray:
    """Accumulated confidence: ``gamma * previous + weight * clamp((tau - risk) / tau, 0, 1)``.

    A risk that is NaN or infinite, or a `tau` of 0, adds nothing.

    Args:
        previous: Confidence so far, ``[n]``.
        risk: Risk at this checkpoint, ``[n]``.
        tau: Threshold, at least 0.
        weight: Weight of this checkpoint, at least 0.
        gamma: Share of the earlier confidence that is kept, at least 0.
        out: Where to write, ``[n]``; a new array by default. Must not be one of the inputs.

    Returns:
        `out`.

    Raises:
        ValueError: If lengths differ or a parameter is negative or not finite.
        TypeError: If an array has another type or gaps, or `out` is an input.
    """

class Probe:
    """A probe: hidden state to risk, ``softplus(out(LayerNorm(project(hidden))))``."""

    def __new__(
        cls,
        project: FloatArray,
        norm_weight: FloatArray,
        norm_bias: FloatArray,
        eps: float,
        out_weight: FloatArray,
        out_bias: float,
    ) -> Probe:
        """Pack a probe.

        Args:
            project: Projection, ``[rank, width]``, of any layout.
            norm_weight: Scale of the LayerNorm, ``[rank]``.
            norm_bias: Shift of the LayerNorm, ``[rank]``.
            eps: Added to the variance in the LayerNorm.
            out_weight: Output row, ``[rank]``.
            out_bias: Output bias.

        Raises:
            ValueError: If shapes disagree, are empty, or a value is not finite.
        """
    @property
    def width(self) -> int:
        """Width of the hidden states it reads."""
    @property
    def rank(self) -> int:
        """Rank of its projection."""
    def risk(self, hidden: npt.NDArray[Any], dtype: str = "f32") -> FloatArray:
        """Risk of every row, read in place.

        Args:
            hidden: ``[rows, width]``, rows of any stride. float32 for "f32"; uint16 or int16
                holding the bits for "bf16" and "f16"; float16 for "f16".
            dtype: "f32", "bf16" or "f16".

        Returns:
            Risks, ``[rows]``; NaN where a state is not finite.

        Raises:
            ValueError: If the width is not the probe's, or `dtype` is none of the three.
            TypeError: If `hidden` has another type or its rows have gaps.
        """

MatrixWeights = tuple[int, int, int, str]
"""Address, rows, columns and type ("f32", "bf16", "f16") of a contiguous matrix in torch's memory.

It must stay there, unchanged during calls, for as long as what was made from it is used."""
LinearWeights = tuple[MatrixWeights, FloatArray | None]
"""A matrix ``[outputs, inputs]`` and its bias ``[outputs]``."""
NormWeights = tuple[FloatArray, float]
"""What a root-mean-square norm multiplies by, and its epsilon."""

class LayerWeights(TypedDict):
    """A decoder layer of the Llama recipe."""

    before_attention: NormWeights | None
    after_attention: NormWeights | None
    before_mlp: NormWeights | None
    after_mlp: NormWeights | None
    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    query_norm: NormWeights | None
    """As wide as a head, or as all of them."""
    key_norm: NormWeights | None
    rotation: int | None
    """Which of a call's rotations turns queries and keys."""
    kv_heads: int
    head_dim: int
    group: int
    """Query heads for each head of keys."""
    scaling: float
    softcap: float | None
    window: int | None
    """Positions that a node sees back to, itself included."""
    output: LinearWeights
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    activation: str
    """"silu" or "gelu_tanh"."""

class KvCache:
    """K and V of some rows in the layers of a stack, in the type of its weights. Made by it."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
    def shape(self, layer: int) -> tuple[int, int, int]:
        """Rows, heads and numbers of a head of a layer's K and V.

        Raises:
            ValueError: If the layer does not exist.
        """
    def load(self, layer: int, first: int, keys: int, values: int, slots: int) -> None:
        """Take slots from two tensors.

        Args:
            layer: Which layer.
            first: The slot that their first place goes to.
            keys: Address of contiguous keys ``[rows, heads, slots, dim]`` of the cache's type.
            values: Address of the values, likewise.
            slots: How many slots they hold.

        Raises:
            ValueError: If the layer does not exist or an address is not aligned.
        """
    def store(
        self,
        layer: int,
        first: int,
        length: npt.NDArray[np.int64],
        keys: int,
        values: int,
        slots: int,
    ) -> None:
        """Give slots `first` to ``length[row] - 1`` to two such tensors, from their first place on.

        Raises:
            ValueError: If the layer does not exist, an address is not aligned, or there are more
                slots than places.
        """
    def keep(
        self,
        length: npt.NDArray[np.int64],
        path: npt.NDArray[np.int64],
        kept: npt.NDArray[np.int64],
    ) -> None:
        """Move K and V of accepted nodes together, in all layers.

        Args:
            length: Settled slots before, ``[rows]``.
            path: Open nodes that stay, ascending, ``[rows, most]``.
            kept: How many of them count, ``[rows]``.

        Raises:
            ValueError: If a path does not ascend or leads beyond what the cache holds.
        """

class LayerStack:
    """Decoder layers that run one after the other. Immutable, so threads may share it."""

    def __new__(cls, layers: list[LayerWeights], mix: MatrixWeights | None = None) -> LayerStack:
        """Join layers.

        Args:
            layers: The layers.
            mix: Matrix ``[width, width]`` or ``[width, 2 * width]`` whose product with the
                normalised state (and feedback) is added to the state before the first layer.

        Raises:
            ValueError: If parts do not fit each other, or SEDAC_KERNEL names a kernel that this
                processor cannot run.
        """
    @property
    def kernel(self) -> str:
        """The kernel that it uses, "scalar" or "avx2"."""
    def cache(self, rows: int) -> KvCache:
        """An empty cache for `rows` rows."""
    def run(
        self,
        cache: KvCache,
        states: FloatArray,
        feedback: FloatArray | None,
        first: npt.NDArray[np.int64],
        length: npt.NDArray[np.int64],
        tree: npt.NDArray[np.bool_],
        rotations: list[tuple[FloatArray, FloatArray]],
        start: int,
        stop: int | None,
        threads: int,
        rows: npt.NDArray[np.int64] | None = None,
        kept: npt.NDArray[np.int64] | None = None,
        spread: FloatArray | None = None,
    ) -> None:
        """Run the tokens of some rows through some layers.

        A token's result has the same bits whatever other tokens there are and however many threads
        work on it.

        Args:
            cache: K and V, read and written.
            states: ``[rows * n, width]``, replaced by what comes out.
            feedback: Second input of the mix, same shape; zeros if None.
            first: First slot of each row that is no padding, ``[rows]``.
            length: Settled slots of each row, ``[rows]``.
            tree: Which open nodes each node sees, ``[rows, n, open]``.
            rotations: Cosines and sines ``[rows * n, rotated width]`` of each kind.
            start: First layer.
            stop: End of the layers. None runs just as far as K and V of the last one, and leaves
                `states` as they are.
            threads: Threads to use at most.
            rows: Which rows of the cache all of this is about, in ascending order; None for all.
            kept: How many channels of its gated unit each token runs, the first ones, ``[layers of
                the call, rows * n]``; all of them if None.
            spread: Takes how evenly each token attends in the last layer of the call, ``[rows *
                n]``: the mean over query heads of ``H(weights) / ln(visible keys)``, a lone key
                counting as two. None where nobody asks; states have the same bits either way.

        Raises:
            ValueError: If arguments do not fit each other.
            TypeError: If an array has another type or gaps.
        """

class OutputHead:
    """A final norm and an output layer. Immutable, so threads may share it."""

    def __new__(
        cls,
        norm_weight: FloatArray,
        eps: float,
        linear: LinearWeights,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> OutputHead:
        """Join the two.

        Args:
            norm_weight: What the norm multiplies by, ``[width]``.
            eps: Its epsilon.
            linear: The output layer.
            scale: What logits are multiplied by.
            softcap: Bound that logits are softly kept under.

        Raises:
            ValueError: If an address, a shape or a type cannot be used.
        """
    def run(self, states: FloatArray, logits: FloatArray, threads: int) -> None:
        """Logits of states.

        Args:
            states: ``[tokens, width]``.
            logits: ``[tokens, vocabulary]``, written.
            threads: Threads to use at most.

        Raises:
            ValueError: If lengths do not fit.
        """
    def best(
        self,
        states: FloatArray,
        words: npt.NDArray[np.int64],
        sound: npt.NDArray[np.bool_],
        threads: int,
    ) -> None:
        """The word with the largest logit, the first of equal ones.

        Args:
            states: ``[tokens, width]``.
            words: ``[tokens]``, written.
            sound: Whether the logit is finite, ``[tokens]``, written. A logit that is not a number
                counts as the largest.
            threads: Threads to use at most.

        Raises:
            ValueError: If lengths do not fit.
        """
    def top(
        self,
        states: FloatArray,
        words: npt.NDArray[np.int64],
        chances: FloatArray,
        threads: int,
    ) -> None:
        """The most probable words, the best first.

        Args:
            states: ``[tokens, width]``.
            words: ``[tokens, count]``, written.
            chances: Their probabilities, same shape, written; 0 beyond the vocabulary, NaN where a
                logit is not a number.
            threads: Threads to use at most.

        Raises:
            ValueError: If lengths do not fit.
        """

class DraftTree:
    """The tree of drafts of one row: the most probable continuations of its last token.

    Nodes stand in the order in which they were taken; a parent always stands before its children.
    Each attribute is a list of its own, made when it is asked for.
    """

    def __new__(cls, root: int, limit: int, *, chain: bool = False) -> DraftTree:
        """Begin with the root alone.

        Args:
            root: The last token of the text.
            limit: Largest depth that may be of use; 0 for no drafts.
            chain: Whether each node may have one child only.
        """
    @property
    def tokens(self) -> list[int]:
        """Token of each node; node 0 is the root, the last token of the text."""
    @property
    def parents(self) -> list[int]:
        """Parent of each node, -1 for the root."""
    @property
    def scores(self) -> list[float]:
        """Probability that the node's whole path is what the base says."""
    @property
    def depths(self) -> list[int]:
        """Steps from the root."""
    @property
    def origins(self) -> list[int]:
        """`ROOT`, `HEAD`, `LOOKUP` or `BLANK`, see `sedac_hf.generation.draft_tree`."""
    @property
    def ranks(self) -> list[int]:
        """Place among its parent's candidates, from 0."""
    @property
    def expanded(self) -> set[int]:
        """Nodes whose children an exit head was asked for."""
    @property
    def matched(self) -> int:
        """Tokens that matched where a continuation was found in the text, else 0."""
    def __len__(self) -> int:
        """Nodes, blanks included."""
    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with a token, or None."""
    def offer(self, parent: int, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """Put up an exit's candidates behind a node.

        Args:
            parent: The node.
            tokens: Candidates, the most probable first.
            probabilities: What the exit gives them; what is not finite is left out.

        Raises:
            ValueError: If there is no such node, or lengths differ.
        """
    def offer_path(self, tokens: Sequence[int], scores: Sequence[float], matched: int) -> None:
        """Put up a continuation of the root that was found as a whole.

        Args:
            tokens: Its tokens.
            scores: Probability that each, with all before it, is right.
            matched: Tokens that matched where it was found.

        Raises:
            ValueError: If lengths differ.
        """
    def take(self, count: int, least: float = 0.0, known: int | None = None) -> list[int]:
        """Make nodes of the most probable candidates.

        Args:
            count: How many at most.
            least: Probability below which a candidate is not worth a place.
            known: Take only candidates whose parent is among the first `known` nodes.

        Returns:
            The new nodes.
        """
    def next_scores(self, count: int) -> list[float]:
        """Probabilities of the best candidates, the best first."""
    def all_scores(self, count: int) -> list[float]:
        """Probabilities of all that could be verified: nodes, then up to `count` candidates."""
    def cut(self, nodes: int) -> None:
        """Give up the nodes taken last, until `nodes` are left; the root stays."""
    def pad(self, nodes: int) -> None:
        """Fill up with blank nodes, which are never accepted; a chain ends before them."""

def find_continuation(
    text: npt.NDArray[np.int64], shortest: int, longest: int
) -> tuple[int, int] | None:
    """The latest earlier occurrence of a text's last tokens; the longest match wins.

    Args:
        text: ``[length]``.
        shortest: Fewest tokens that count; two at least.
        longest: Most tokens that are looked for.

    Returns:
        The first place behind it, and how many tokens matched; None if there is none.
    """

class DraftPlan:
    """How much to draft in a cycle, by the governor's numbers of that cycle. Immutable.

    Tables by depth or level serve with their last entry whatever lies beyond.
    """

    def __new__(
        cls,
        *,
        most_nodes: int,
        most_levels: int,
        width: int,
        trust: Sequence[float],
        covered: Sequence[float],
        found: Sequence[Sequence[float]],
        levels: Sequence[float],
        full: Sequence[float],
        tail: Sequence[float] | None,
        rate: float,
        share: float,
    ) -> DraftPlan:
        """Note the numbers.

        Args:
            most_nodes: Nodes verified at most.
            most_levels: Calls of the head at most.
            width: Nodes that each level behind the first expands.
            trust: By what to multiply the head's probability of a child, by its depth.
            covered: Share of expanded nodes one of whose children is accepted, by their depth.
            found: Share of tokens of a continuation found in the text that are right, by matched
                tokens (from 1) and depth.
            levels: Seconds of each call of the head.
            full: Seconds of a pass through all layers, by nodes (from 1).
            tail: The same from the head's checkpoint on; None without a head.
            rate: Tokens that a row gains per second.
            share: Of what drafts bring the rows on average, what the row furthest behind has of it.

        Raises:
            ValueError: If a table is empty, or nodes or width are 0.
        """
    def trust(self, depth: int) -> float:
        """By what to multiply the head's probability of a child at `depth`."""
    def found_scores(self, matched: int, count: int) -> list[float]:
        """Probability that each of `count` tokens found in the text is right, given those before.

        Args:
            matched: Tokens that matched.
            count: Tokens of the continuation.
        """
    def worth_asking(self, promise: float) -> bool:
        """Whether a first call of the head promises more than its time would bring otherwise.

        Args:
            promise: Probability that the text itself does not say what comes.
        """
    def worth_a_level(
        self,
        level: int,
        scores: Sequence[Sequence[float]],
        next: Sequence[Sequence[float]],
    ) -> bool:
        """Whether one more call of the head promises more than its time would bring otherwise.

        Args:
            level: Calls so far.
            scores: Probabilities of all that each row could verify by now, the root included.
            next: Those of the nodes that it would expand, which lie `level` deep.
        """
    def best_size(self, scores: Sequence[Sequence[float]], least: int, drafted: bool) -> int:
        """Nodes to verify.

        Args:
            scores: Of each row, the probability of every node, those that must be verified first.
            least: How many must be.
            drafted: Whether the head has run the early layers.
        """

class Embedding:
    """A base's embedding. Immutable, so threads may share it."""

    def __new__(cls, words: MatrixWeights, scale: float | None = None) -> Embedding:
        """Read a matrix in place.

        Args:
            words: A row for each word.
            scale: What rows are multiplied by; products are rounded to the matrix's type.

        Raises:
            ValueError: If the address, the shape or the type cannot be used.
        """
    def look_up(self, tokens: npt.NDArray[np.int64]) -> list[float]:
        """States of some tokens, row after row.

        Raises:
            ValueError: If a token is no word of the matrix.
        """

class CycleOutcome:
    """How a cycle went; lists have an entry for each row that took part."""

    @property
    def rows(self) -> list[int]:
        """Which rows, ascending."""
    @property
    def trees(self) -> list[DraftTree]:
        """Their drafts."""
    @property
    def paths(self) -> list[list[int]]:
        """Nodes that were kept, the root first."""
    @property
    def words(self) -> list[list[int]]:
        """Tokens that each row was given, as many as nodes were kept."""
    @property
    def origins(self) -> list[list[int]]:
        """Who had drafted each of them, as the origins of a tree; `ROOT` for nobody."""
    @property
    def nodes(self) -> int:
        """Nodes verified in each row."""
    @property
    def drafted(self) -> bool:
        """Whether the head was asked."""
    @property
    def levels(self) -> list[float]:
        """Seconds of each call of the head, with what belongs to it."""
    @property
    def verify(self) -> float:
        """Seconds from the drafts to the next roots."""
    @property
    def tapped(self) -> list[FloatArray]:
        """States at each tap and at the end, ``[rows * width]`` each; nothing without taps."""

class GreedyCycle:
    """A batch that is decoded cycle by cycle: drafts, one verification, what the base says too.

    Belongs to one text (or batch), as its caches do; use it from one thread at a time.
    """

    def __new__(
        cls,
        texts: Sequence[npt.NDArray[np.int64]],
        first: npt.NDArray[np.int64],
        length: npt.NDArray[np.int64],
        position: npt.NDArray[np.int64],
        left: npt.NDArray[np.int64],
        counted: npt.NDArray[np.int64],
        ends: Sequence[int],
        least: Sequence[tuple[int, Sequence[int]]],
        head: tuple[int, bool, npt.NDArray[np.int64] | None, FloatArray] | None = None,
        taps: Sequence[int] = (),
    ) -> GreedyCycle:
        """Begin behind a prompt and the token that was chosen after it.

        Args:
            texts: Tokens of each row without padding, that token included.
            first: First slot of each row that is no padding, ``[rows]``.
            length: Settled slots, ``[rows]``.
            position: Position id of each row's last token, ``[rows]``.
            left: Tokens that each row may yet be given, ``[rows]``; 0 where it has ended.
            counted: Tokens of each row as `least` counts them, ``[rows]``.
            ends: Tokens that end a row.
            least: Tokens that may not be said before a row has so many.
            head: The exit head that drafts: layers before its checkpoint, whether it takes
                feedback, tokens of its words (None where words are tokens), and the final-layer
                state of each row's prompt ``[rows, width]``. None for drafts from the text alone.
            taps: Numbers of layers, ascending, after which states are handed out; then nothing is
                drafted.

        Raises:
            ValueError: If lengths differ, a text is empty or a number is negative.
            TypeError: If an array has another type or gaps.
        """
    def run(
        self,
        layers: LayerStack,
        cache: KvCache,
        output: OutputHead,
        embedding: Embedding,
        tables: Sequence[tuple[FloatArray, FloatArray]],
        threads: int,
        plan: DraftPlan | None = None,
        asks: bool = False,
        head: tuple[LayerStack, KvCache, OutputHead] | None = None,
        most: int = 1,
        seconds: float = 0.0,
    ) -> list[CycleOutcome]:
        """Cycles of the rows that have not ended, with the interpreter released.

        At least one is run, and none behind the end of a row.

        Tokens are the base's own best words, the first of equal ones. K/V of rows that have ended
        are left as they are.

        Args:
            layers: The base's layers.
            cache: Their K/V.
            output: The base's final norm and output layer.
            embedding: The base's embedding.
            tables: Cosines and sines of each kind, ``[positions, rotated width]``.
            threads: Threads to use at most.
            plan: How much to draft; None for one token a row.
            asks: Whether the head may be asked.
            head: Layers, K/V and output layer of the head that the cycle was told of.
            most: Cycles at most.
            seconds: Time after which no further cycle is begun.

        Returns:
            How each went; nothing if all rows had ended.

        Raises:
            ValueError: If parts do not fit each other or a position has no row in the tables; the
                cycle must not be used any more then.
            TypeError: If an array has another type or gaps.
        """

def pass_seconds() -> float:
    """Seconds that `LayerStack`, `OutputHead` and `GreedyCycle` have worked in this process.

    What else a decode step takes is the interpreter's; see `sedac_hf.evaluation.core_share`.
    """

def pass_kernels() -> list[str]:
    """Kernels that this processor can run, the fastest last; SEDAC_KERNEL takes their names.

    Those that do not compute what the scalar kernel does are left out.
    """

class Cascade:
    """Rules and probes of all checkpoints. Immutable, so threads may share it."""

    def __new__(
        cls,
        tau: FloatArray,
        weight: FloatArray,
        gamma: FloatArray,
        exit_confidence: FloatArray,
        probes: list[Probe] | None = None,
    ) -> Cascade:
        """Join rules and probes.

        Args:
            tau: Risk thresholds, ``[checkpoints]``.
            weight: Weights, ``[checkpoints]``.
            gamma: Decays, ``[checkpoints]``.
            exit_confidence: Normalised confidence from which a row tries, ``[checkpoints]``.
            probes: One per checkpoint; without them only `step_risk` works.

        Raises:
            ValueError: If lengths or widths disagree, or a value is negative or not finite.
        """
    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints."""
    @property
    def max_confidence(self) -> FloatArray:
        """Greatest accumulated confidence that each checkpoint can reach, ``[checkpoints]``."""
    def step(
        self,
        k: int,
        hidden: npt.NDArray[Any],
        dtype: str,
        confidence: FloatArray,
        active: npt.NDArray[np.bool_] | None = None,
        gamma: FloatArray | None = None,
        most: FloatArray | None = None,
    ) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_], int]:
        """One checkpoint, fused: probe, accumulate, decide.

        Args:
            k: Which checkpoint, from 0.
            hidden: As for `Probe.risk`.
            dtype: As for `Probe.risk`.
            confidence: Accumulated confidence, ``[rows]``, updated in place for active rows.
            active: Rows that have not left, ``[rows]``; all by default.
            gamma: Decays of the rows, ``[rows]``, in place of the rule's; together with `most`.
            most: Greatest confidence that each row could have had, ``[rows]``, updated in place for
                active rows; zeros before the first checkpoint.

        Returns:
            Risk ``[rows]``, normalised confidence ``[rows]`` (both NaN for rows that are not
            active), whether each row tries to exit ``[rows]``, and how many do.

        Raises:
            IndexError: If there is no checkpoint `k`.
            ValueError: If there are no probes, or a length or width disagrees.
            TypeError: If an array has another type or layout.
        """
    def step_risk(
        self,
        k: int,
        risk: FloatArray,
        confidence: FloatArray,
        active: npt.NDArray[np.bool_] | None = None,
        gamma: FloatArray | None = None,
        most: FloatArray | None = None,
    ) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_], int]:
        """The same from risks that are already known, ``[rows]``. Returns them unchanged."""

class ReplayResult(TypedDict):
    """What each policy would have done."""

    doc_delta: FloatArray
    """Mean over a document's tokens of `delta_nll`, 0 where not exited, ``[policies, docs]``."""
    exits: npt.NDArray[np.int64]
    """Tokens that left at each checkpoint, ``[policies, checkpoints]``."""
    tries: npt.NDArray[np.int64]
    """Tokens that tried to, ``[policies, checkpoints]``."""
    tokens: int
    """Number of tokens replayed, eligible or not."""

def replay(
    risk: FloatArray,
    probability: FloatArray,
    delta_nll: FloatArray,
    eligible: npt.NDArray[np.bool_],
    doc_offsets: npt.NDArray[np.int64],
    tau: FloatArray,
    weight: FloatArray,
    gamma: FloatArray,
    exit_confidence: FloatArray,
    min_probability: FloatArray,
    history: tuple[FloatArray, float, float, float] | None = None,
) -> ReplayResult:
    """Replay many policies over recorded traces, in parallel.

    A token leaves at the first checkpoint where its normalised confidence reaches
    `exit_confidence` and, unless `min_probability` is 0 there, the exit's own probability reaches
    that. Values of checkpoints at which no token leaves are not looked at.

    Args:
        risk: ``[tokens, checkpoints]``.
        probability: Largest probability of each exit, ``[tokens, checkpoints]``.
        delta_nll: Loss of leaving there over that of the full depth, same shape.
        eligible: Tokens that may leave, ``[tokens]``.
        doc_offsets: First token of each document and the number of tokens, ``[docs + 1]``;
            no document may be empty.
        tau: ``[policies, checkpoints]``, as the four that follow.
        weight: At least 0.
        gamma: At least 0.
        exit_confidence: At least 0; above 1 never exits.
        min_probability: At least 0; 0 asks for none.
        history: With it decays follow each document, as `RowHistory` has them: entropy of the full
            depth at each token ``[tokens]``, its scale, the bonus, and the momentum.

    Returns:
        The outcome of every policy.

    Raises:
        ValueError: If shapes disagree, offsets are not increasing, or a value is not allowed.
        TypeError: If an array has another type or layout.
        MemoryError: If the result does not fit.
    """

def betting_p_value(x: npt.NDArray[np.float64], alpha: float, delta: float) -> float:
    """Betting p-value (Waudby-Smith and Ramdas) against ``E[x] > alpha``.

    Args:
        x: Independent observations in [0, 1], in an order that does not depend on their values.
        alpha: Bar, in [0, 1].
        delta: Level that the bets are sized for, in (0, 1); the p-value is valid for any.

    Returns:
        The p-value; 1 without observations.

    Raises:
        ValueError: If a value is out of range or NaN.
    """

def hoeffding_bentkus_p_value(n: int, mean: float, alpha: float) -> float:
    """Hoeffding-Bentkus p-value against ``E[x] > alpha``.

    Args:
        n: Number of independent observations in [0, 1].
        mean: Their mean.
        alpha: Bar, in [0, 1].

    Returns:
        The p-value; 1 without observations.

    Raises:
        ValueError: If a value is out of range or NaN.
    """

def fixed_sequence(p_values: npt.NDArray[np.float64], delta: float) -> int:
    """How many p-values are rejected in order, each at `delta`, before the first that is not.

    Args:
        p_values: In the order of the test; NaN is not rejected.
        delta: Level, in (0, 1).

    Returns:
        The number rejected, 0 if the first is not.

    Raises:
        ValueError: If `delta` is out of range.
    """

class TensorBuffer:
    """A tensor that stays where it is: its address, its shape, and a hold on what owns it.

    `numpy.asarray` of it is an array over the same memory, read-only.
    """

    def __new__(cls, source: Any) -> TensorBuffer:
        """Hand a tensor over without a copy. Who owns the memory must not write to it any more.

        Args:
            source: A C-contiguous NumPy array, which is made read-only, or a tensor on the CPU that
                `numpy.from_dlpack` takes; bfloat16 travels as int16 (``tensor.view(torch.int16)``).

        Raises:
            TypeError: If it is something else, has gaps, or elements of another type than float32,
                float64, int64, int16, uint16, uint8 and bool.
        """
    @property
    def address(self) -> int:
        """Address of the first element."""
    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
    @property
    def dtype(self) -> str:
        """NumPy's name of what its elements are."""
    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What `numpy.asarray` reads."""

class HistogramCounts(TypedDict):
    """Values between bounds."""

    counts: list[int]
    """Values up to each bound and above the one before; those above the last come last."""
    sum: float
    """Sum of the values."""
    squares: float
    """Sum of their squares."""
    not_finite: int
    """Values that were NaN or infinite and are not among the rest."""

class LayerCounts(TypedDict):
    """What is known of a checkpoint."""

    layer: int
    decisions: int
    tries: int
    exits: int
    threshold: float
    """Of the last decision; NaN before."""
    skipped: float
    """Sum over the exits of the share that was skipped."""
    risk: HistogramCounts
    confidence: HistogramCounts
    seconds: HistogramCounts
    """Of the tokens that left there."""

class MetricsCounts(TypedDict):
    """Everything that an `AsyncBatchProcessor` has counted."""

    sent: int
    """Tokens, decisions, calls and occurrences handed over; those below add up to it."""
    taken: int
    dropped: int
    waiting: int
    capacity: int
    """Steps that may wait."""
    tokens: list[int]
    """By mode."""
    calls: list[HistogramCounts]
    """Their seconds, by mode."""
    full: int
    """Tokens that left nowhere."""
    full_seconds: HistogramCounts
    first_seconds: HistogramCounts
    sources: list[int]
    """Tokens by who had drafted them: the base, an exit head, the text."""
    passes: int
    drafts: int
    occurrences: dict[str, int]
    layers: list[LayerCounts]

class AsyncBatchProcessor:
    """A worker thread that adds up what models report, behind a bounded queue.

    Handing over never waits for the worker: what a full queue refuses is counted. The worker needs
    no interpreter. A forked child gets a queue, a worker and counts of its own.
    """

    def __new__(
        cls,
        layers: list[int],
        modes: int,
        bounds: tuple[list[float], list[float], list[float], list[float]],
        capacity: int = 4096,
        log_size: int = 10_000,
        linger: float = 0.05,
    ) -> AsyncBatchProcessor:
        """Start the worker.

        Args:
            layers: Layers to watch.
            modes: How many modes there are.
            bounds: Bounds of risks, of confidences, of seconds per token and per call, ascending.
            capacity: Steps that may wait.
            log_size: Decisions that are remembered.
            linger: Seconds that the worker waits for more once something has come.

        Raises:
            ValueError: If a layer comes twice, bounds do not ascend, or nothing may wait.
            RuntimeError: If no thread can be had.
        """
    def submit(
        self,
        mode: int,
        depth: int,
        first: bool,
        tokens: TensorBuffer,
        seconds: TensorBuffer,
        *,
        counts: TensorBuffer | None = None,
        sources: TensorBuffer | None = None,
        checkpoints: list[TensorBuffer | None] | None = None,
        passes: int = 0,
        drafts: int = 0,
    ) -> bool:
        """Hand over the tokens of a step.

        Args:
            mode: Index of the mode.
            depth: Layers of the base.
            first: Whether these are their rows' first tokens, whose time is mostly the prompt's.
            tokens: int64 ``[tokens]``; -1 where not known.
            seconds: What each took, float32 ``[tokens]``.
            counts: Which of them count, bool ``[tokens]``; all by default.
            sources: Who had drafted each, uint8 ``[tokens]``; the base by default.
            checkpoints: Layers (int64) and thresholds (float32) ``[checkpoints]``; checkpoint that
                each token left at, or -1 (int64), ``[tokens]``; risks, confidences (float32) and
                tries (bool) ``[tokens, checkpoints]``, NaN where a token did not come; and the
                share that each skipped (float32 ``[tokens]``), or None for all of it.
            passes: Verifications of drafts in this step.
            drafts: Drafts that they verified.

        Returns:
            Whether there was room.

        Raises:
            ValueError: If lengths do not fit or there is no such mode.
            TypeError: If a tensor holds elements of another type.
        """
    def submit_decision(
        self,
        token: int,
        layer: int,
        risk: float,
        threshold: float,
        confidence: float,
        exits: bool,
        skipped: float,
        seconds: float,
    ) -> bool:
        """Hand over a single decision; NaN seconds are not counted.

        Raises:
            ValueError: If the layer is not watched.
        """
    def submit_call(self, mode: int, seconds: float) -> bool:
        """Count a call that has ended."""
    def submit_occurrence(self, name: str) -> bool:
        """Count something else, by name."""
    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until what was handed over before is counted; False if it took longer."""
    def close(self) -> None:
        """Count what waits and end the worker; from then on everything is dropped and counted."""
    def snapshot(self) -> MetricsCounts:
        """Everything that was counted."""
    def log(
        self,
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        FloatArray,
        FloatArray,
        FloatArray,
        npt.NDArray[np.bool_],
        FloatArray,
        npt.NDArray[np.float64],
    ]:
        """The last decisions, oldest first.

        Returns:
            Tokens, layers, risks, thresholds, confidences, exits, shares skipped, seconds.
        """

def histogram(values: FloatArray, edges: FloatArray) -> npt.NDArray[np.int64]:
    """Counts of values between edges.

    Bin ``i`` holds the values that ``i`` edges do not exceed; the last bin of all holds those that
    are NaN or infinite. The counts add up to ``n``.

    Args:
        values: ``[n]``.
        edges: Not decreasing, ``[edges]``.

    Returns:
        Counts, ``[edges + 2]``.

    Raises:
        ValueError: If an edge is not finite or below the one before.
        TypeError: If an array has another type or gaps.
    """

def kl_divergence(
    live: npt.NDArray[np.float64], reference: npt.NDArray[np.float64], prior: float
) -> float:
    """Kullback-Leibler divergence ``sum p ln(p / q)`` of two histograms, in nats.

    Args:
        live: Counts that give p, ``[bins]``; they need not be whole.
        reference: Counts that give q, ``[bins]``.
        prior: Added to every bin of both, above 0, so that the result is finite.

    Returns:
        The divergence, at least 0.

    Raises:
        ValueError: If lengths differ, a count is negative or not finite, or `prior` is not above 0.
        TypeError: If an array has another type or gaps.
    """
