"""The frozen base runs once over every text; its states go to disk and heads train from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sedac_hf.calibration.documents import Document, batches_of
from sedac_hf.calibration.feature_cache import FeatureCache
from sedac_hf.calibration.progress import progress_bar
from sedac_hf.calibration.work_sizes import WorkSizes, most_logits
from sedac_hf.core.attention_spread import Spread, spread_reason
from sedac_hf.errors import CalibrationError

if TYPE_CHECKING:
    from sedac_hf.core.base_shell import BaseShell, LayerCall

logger = logging.getLogger(__name__)

TOP = 24  # teacher words kept per token


@dataclass(frozen=True)
class DocumentBatch:
    """Some documents, padded on the right, with everything the base said about them.

    Attributes:
        ids: Token ids, ``[rows, seq]``.
        mask: 1 where there is a token, ``[rows, seq]``.
        states: States of one checkpoint, ``[rows, seq, width]``.
        final: Final-layer states before the norm, ``[rows, seq, width]``.
        top_ids: Most probable next tokens at full depth, ``[rows, seq, TOP]``.
        top_probabilities: Their probabilities, ``[rows, seq, TOP]``.
        entropy: Entropy at full depth, nats, ``[rows, seq]``.
        spread: How evenly the checkpoint's layer attends, ``[rows, seq]``; NaN where that is not
            known, as it is not of the embedding.
        prompt_lengths: ``[rows]``.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    final: Tensor
    top_ids: Tensor
    top_probabilities: Tensor
    entropy: Tensor
    spread: Tensor
    prompt_lengths: Tensor


class BaseStates:
    """Memory-mapped states of the base over a set of documents.

    States are bfloat16 (kept as their bits), so 1,000 tokens of a base of width 576 with three
    checkpoints take 4.6 MB. Recording goes on where it was interrupted.
    """

    def __init__(
        self,
        directory: Path,
        documents: Sequence[Document],
        checkpoints: Sequence[int],
        width: int,
        *,
        cache_bytes: int = 1 << 28,
    ) -> None:
        """Open or create the files.

        Args:
            directory: Where they live.
            documents: The documents, in order.
            checkpoints: Layers whose output is kept; -1 is the embedding.
            width: Width of the base's hidden states.
            cache_bytes: Bytes of documents that are kept in memory, on the device that asked for
                them.
        """
        self._features = FeatureCache(cache_bytes)
        self.directory = directory
        self.documents = list(documents)
        self.checkpoints = tuple(checkpoints)
        self.width = width
        self.offsets = np.concatenate([[0], np.cumsum([len(d) for d in self.documents])])
        directory.mkdir(parents=True, exist_ok=True)
        tokens = int(self.offsets[-1])
        key = {
            "documents": [d.hash for d in self.documents],
            "checkpoints": list(self.checkpoints),
            "width": width,
            # What was recorded before these were kept is recorded anew.
            "spread": True,
            "done": "documents",
        }
        fresh = self._read_key() != key
        mode = "w+" if fresh else "r+"

        def array(name: str, dtype: type, *shape: int) -> np.memmap:
            return np.memmap(directory / f"{name}.bin", dtype, mode, shape=(tokens, *shape))  # type: ignore[call-overload, no-any-return]

        self._states = {
            layer: array(f"state_{layer}", np.int16, width) for layer in self.checkpoints
        }
        self._spreads = {
            layer: array(f"spread_{layer}", np.float32) for layer in self.checkpoints if layer >= 0
        }
        self._final = array("final", np.int16, width)
        self._top_ids = array("top_ids", np.int32, TOP)
        self._top_probabilities = array("top_probabilities", np.float16, TOP)
        self._entropy = array("entropy", np.float32)
        if fresh:
            (directory / "key.json").write_text(json.dumps(key))
            for old in directory.glob("done-*"):
                old.unlink()

    def record(
        self,
        shell: BaseShell,
        *,
        part: tuple[int, int] = (0, 1),
        rows: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        progress: bool = True,
    ) -> None:
        """Run the base over every document that is not on disk yet.

        Args:
            shell: Shell of the base.
            part: This process's number and the number of processes that share the work.
            rows: Documents that are needed; None means all of them.
            batch_tokens: Most tokens of one forward, padding included; None picks it from the
                device.
            progress: Show a progress bar.
        """
        batch_tokens = batch_tokens or WorkSizes.of(shell.base).record_tokens
        mine, known = self._order(rows)[part[0] :: part[1]], self._recorded()
        left = [i for i in mine if i not in known]
        total, due = (sum(len(self.documents[i]) for i in some) for some in (mine, left))
        marker = self.directory / f"done-{part[0]}-{part[1]}"
        observed = self._observable(shell) if left else frozenset()
        bar = progress_bar(total, "states", "tok", initial=total - due, shown=progress)
        for some in batches_of(self.documents, left, batch_tokens):
            with torch.inference_mode():
                self._record_rows(shell, some, observed)
            bar.update(sum(len(self.documents[i]) for i in some))
            self._flush()
            with marker.open("a") as file:
                file.writelines(f"{i}\n" for i in some)
        bar.close()
        self._features.clear()

    def batch(
        self, rows: Sequence[int], layer: int, device: torch.device | str = "cpu"
    ) -> DocumentBatch:
        """Read documents back, padded on the right.

        Args:
            rows: Indices of documents.
            layer: Which checkpoint's states to read.
            device: Where to put them.

        Returns:
            The batch, float32.
        """
        device = torch.device(device)
        found = [
            self._features.get((i, layer, device), partial(self._read, i, layer, device))
            for i in rows
        ]
        ids, states, final, top_ids, top_probabilities, entropy, spread = (
            pad_sequence(list(part), batch_first=True) for part in zip(*found, strict=True)
        )
        lengths = torch.tensor([len(self.documents[i]) for i in rows], device=device)
        position = torch.arange(ids.shape[1], device=device)
        return DocumentBatch(
            ids=ids.long(),
            mask=(position < lengths[:, None]).long(),
            states=states.float(),
            final=final.float(),
            top_ids=top_ids.long(),
            top_probabilities=top_probabilities.float(),
            entropy=entropy,
            spread=spread,
            prompt_lengths=torch.tensor(
                [self.documents[i].prompt_length for i in rows], device=device
            ),
        )

    def _read(self, i: int, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """One document as it is on disk: narrow types, so that many fit into the cache."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        unknown = np.full(len(self.documents[i]), np.nan, np.float32)
        spread = self._spreads[layer][span] if layer in self._spreads else unknown
        parts = (
            torch.from_numpy(np.asarray(self.documents[i].ids, np.int32)),
            _from_bits(self._states[layer][span]),
            _from_bits(self._final[span]),
            *(
                torch.from_numpy(np.array(array[span]))
                for array in (self._top_ids, self._top_probabilities, self._entropy)
            ),
            torch.from_numpy(np.array(spread)),
        )
        return tuple(part.to(device) for part in parts)

    def token_mass(self, rows: Sequence[int], vocabulary: int) -> npt.NDArray[np.float64]:
        """Probability that the base gave each token, summed over documents; ``[vocabulary]``."""
        mass = np.zeros(vocabulary)
        for i in rows:
            span = slice(self.offsets[i], self.offsets[i + 1])
            weights = self._top_probabilities[span].astype(np.float64).ravel()
            mass += np.bincount(self._top_ids[span].ravel(), weights, vocabulary)
        return mass

    def _observable(self, shell: BaseShell) -> frozenset[int]:
        """Checkpoints of whose layers it can be told how evenly they attend."""
        reasons = {layer: spread_reason(shell, layer) for layer in self._spreads}
        for reason in dict.fromkeys(filter(None, reasons.values())):
            logger.info("gates are fitted without the attention: %s", reason)
        return frozenset(layer for layer, reason in reasons.items() if reason is None)

    def _record_rows(
        self, shell: BaseShell, rows: Sequence[int], observed: Collection[int]
    ) -> None:
        lengths = [len(self.documents[i]) for i in rows]
        ids = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(rows):
            ids[row, : lengths[row]] = torch.from_numpy(self.documents[i].ids)
            mask[row, : lengths[row]] = 1
        device = shell.base.device
        hidden, calls = shell.prologue(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        )
        kept = {-1: hidden} if -1 in self.checkpoints else {}
        spreads = {layer: Spread() for layer in observed}
        for layer in range(shell.num_layers):
            hidden = shell.layer(layer, hidden, calls[layer], spread=spreads.get(layer))
            if layer in self.checkpoints:
                kept[layer] = hidden
        real = mask.bool().to(device)
        places = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows])
        for layer, states in kept.items():
            self._states[layer][places] = _to_bits(states[real])
        for layer, array in self._spreads.items():
            found = spreads[layer].risk if layer in spreads else None
            array[places] = np.nan if found is None else found[real.to(found.device)].cpu().numpy()
        self._final[places] = _to_bits(hidden[real])
        self._record_teacher(shell, hidden[real], places)

    def _record_teacher(
        self, shell: BaseShell, final: Tensor, places: npt.NDArray[np.int64]
    ) -> None:
        for part, logits in iter_logits(shell, final):
            log_p = torch.log_softmax(logits.float(), -1)
            top = log_p.topk(min(TOP, log_p.shape[-1]), -1)
            at, count = places[part], top.indices.shape[-1]
            self._top_ids[at, :count] = top.indices.cpu().numpy().astype(np.int32)
            self._top_probabilities[at, :count] = top.values.exp().cpu().numpy()
            entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
            if not torch.isfinite(entropy).all():
                raise CalibrationError(
                    "the base gives NaN or infinite logits on its texts; check its weights and "
                    "dtype before fitting exits"
                )
            self._entropy[at] = entropy.cpu().numpy()

    def _flush(self) -> None:
        """Hand the pages to the file before it is noted that they are there."""
        arrays = (self._final, self._top_ids, self._top_probabilities, self._entropy)
        for array in (*self._states.values(), *self._spreads.values(), *arrays):
            array.flush()

    def _order(self, rows: Sequence[int] | None) -> list[int]:
        """Longest first: padding is least, and a memory problem shows at once."""
        wanted = range(len(self.documents)) if rows is None else rows
        return sorted(wanted, key=lambda i: (-len(self.documents[i]), i))

    def _recorded(self) -> set[int]:
        """Documents that are on disk, by whichever process; a line cut off does not count."""
        markers = self.directory.glob("done-*")
        return {int(i) for m in markers for i in m.read_text().rpartition("\n")[0].split()}

    def _read_key(self) -> object:
        path = self.directory / "key.json"
        return json.loads(path.read_text()) if path.exists() else None


def iter_logits(shell: BaseShell, final: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of many final-layer states, a bounded number at a time.

    Args:
        shell: Shell of the base.
        final: States, ``[tokens, width]``.

    Yields:
        Which tokens, and their logits ``[some, vocabulary]``.
    """
    most = most_logits(shell.base.device)
    step = max(1, most // int(shell.base.config.get_text_config().vocab_size))
    final = final.to(shell.base.device, shell.base.dtype)
    for start in range(0, len(final), step):
        part = slice(start, min(start + step, len(final)))
        yield part, shell.logits(final[part].unsqueeze(0)).squeeze(0)


def template_call(shell: BaseShell, batch: DocumentBatch, layer: int) -> LayerCall:
    """What the base's decoder would pass to `layer` for these documents.

    Args:
        shell: Shell of the base.
        batch: The documents.
        layer: The template layer of an exit block.

    Returns:
        The recorded call: masks, positions and rotary tables, no cache.
    """
    device = shell.base.device
    with torch.no_grad():
        _, calls = shell.prologue(
            input_ids=batch.ids.to(device),
            attention_mask=batch.mask.to(device),
            use_cache=False,
        )
    return calls[layer]


def _to_bits(states: Tensor) -> npt.NDArray[np.int16]:
    bits = states.to("cpu", torch.bfloat16).view(torch.int16)
    return bits.numpy()


def _from_bits(bits: npt.NDArray[np.int16]) -> Tensor:
    return torch.from_numpy(np.array(bits)).view(torch.bfloat16)
