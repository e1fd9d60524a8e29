"""States on disk are those of the base, whatever the batch; recording goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.states import BaseStates
from sedac_hf.core.base_shell import BaseShell
from tests.core.test_attention_spread import by_weights
from tests.tiny_models import build_tiny


def some_documents(vocabulary: int) -> list[Document]:
    """Documents of different lengths."""
    rng = np.random.default_rng(1)
    return [Document(rng.integers(1, vocabulary, size=n), 2) for n in (9, 4, 13, 6, 13)]


def open_states(model: PreTrainedModel, folder: Path) -> BaseStates:
    """States of the embedding and of layer 0."""
    config = model.config.get_text_config()
    return BaseStates(folder, some_documents(config.vocab_size), [-1, 0], config.hidden_size)


def test_what_is_read_back_is_what_the_base_says(tiny: PreTrainedModel, tmp_path: Path) -> None:
    states = open_states(tiny, tmp_path)
    states.record(BaseShell(tiny), batch_tokens=27, progress=False)
    for i, document in enumerate(states.documents):
        with torch.no_grad():
            out = tiny(torch.from_numpy(document.ids)[None])
        p = out.logits[0].float().softmax(-1)
        batch = states.batch([i], 0)
        kept = min(24, p.shape[-1])
        top = batch.top_probabilities[0, :, :kept]
        torch.testing.assert_close(top, p.topk(kept).values, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(
            p.gather(-1, batch.top_ids[0, :, :kept]), top, rtol=2e-2, atol=2e-3
        )
        entropy = torch.special.entr(p).sum(-1)
        torch.testing.assert_close(batch.entropy[0], entropy, rtol=1e-3, atol=1e-3)


def test_states_of_a_llama_are_its_hidden_states(llama: PreTrainedModel, tmp_path: Path) -> None:
    states = open_states(llama, tmp_path)
    states.record(BaseShell(llama), progress=False)
    for i, document in enumerate(states.documents):
        with torch.no_grad():
            hidden = llama(torch.from_numpy(document.ids)[None], output_hidden_states=True)
        for layer, place in ((-1, 0), (0, 1)):
            expected = hidden.hidden_states[place][0]
            torch.testing.assert_close(
                states.batch([i], layer).states[0], expected, rtol=1e-2, atol=1e-3
            )


def test_batches_are_padded_on_the_right(llama: PreTrainedModel, tmp_path: Path) -> None:
    states = open_states(llama, tmp_path)
    states.record(BaseShell(llama), progress=False)
    batch = states.batch([1, 2], 0)
    assert batch.ids.shape == (2, 13)
    assert batch.mask.sum(-1).tolist() == [4, 13]
    assert not batch.states[0, 4:].any()
    assert torch.equal(batch.states[1], states.batch([2], 0).states[0])


def test_shares_of_two_processes_make_the_whole(llama: PreTrainedModel, tmp_path: Path) -> None:
    shell = BaseShell(llama)
    whole, shared = open_states(llama, tmp_path / "a"), open_states(llama, tmp_path / "b")
    whole.record(shell, progress=False)
    for rank in range(2):
        open_states(llama, tmp_path / "b").record(shell, part=(rank, 2), progress=False)
    for i in range(5):
        torch.testing.assert_close(shared.batch([i], 0).final, whole.batch([i], 0).final)


def note_rows(patch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Documents that are recorded from now on; an interrupt comes after so many."""
    recorded: list[int] = []
    record_rows = BaseStates._record_rows

    def noted(self: BaseStates, shell: BaseShell, rows: list[int], *more: Any) -> None:
        if len(recorded) == stop_after:
            raise KeyboardInterrupt
        recorded.extend(rows)
        record_rows(self, shell, rows, *more)

    patch.setattr(BaseStates, "_record_rows", noted)
    return recorded


def test_recording_goes_on_where_it_stopped(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell, first = BaseShell(llama), open_states(llama, tmp_path)
    with monkeypatch.context() as patch:
        before = note_rows(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            first.record(shell, batch_tokens=13, progress=False)
    after = note_rows(monkeypatch)
    again = open_states(llama, tmp_path)
    again.record(shell, batch_tokens=13, progress=False)
    assert sorted(before + after) == [0, 1, 2, 3, 4]
    assert again.batch([1], 0).final.any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_the_spread_of_attention_is_kept_where_it_is_known(name: str, tmp_path: Path) -> None:
    base = build_tiny(name)
    states = open_states(base, tmp_path)
    states.record(BaseShell(base), batch_tokens=27, progress=False)
    for i, document in enumerate(states.documents):
        assert states.batch([i], -1).spread.isnan().all()
        found = states.batch([i], 0).spread
        if name == "falcon":
            assert found.isnan().all()
            continue
        with torch.no_grad():
            expected = by_weights(base, torch.from_numpy(document.ids)[None], None)[0]
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_states_without_the_spread_are_recorded_anew(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    states = open_states(llama, tmp_path)
    states.record(BaseShell(llama), progress=False)
    key = json.loads((tmp_path / "key.json").read_text())
    del key["spread"]
    (tmp_path / "key.json").write_text(json.dumps(key))
    again = open_states(llama, tmp_path)
    assert not list(tmp_path.glob("done-*"))
    again.record(BaseShell(llama), progress=False)
    assert (again.batch([2], 0).spread[0, 1:] > 0).all()


def test_other_documents_start_anew(llama: PreTrainedModel, tmp_path: Path) -> None:
    open_states(llama, tmp_path).record(BaseShell(llama), progress=False)
    width = llama.config.hidden_size
    fresh = BaseStates(tmp_path, [Document(np.array([1, 2, 3]))], [0], width)
    assert not fresh.batch([0], 0).final.any()


def test_token_mass_adds_up_to_the_tokens(llama: PreTrainedModel, tmp_path: Path) -> None:
    states = open_states(llama, tmp_path)
    states.record(BaseShell(llama), progress=False)
    mass = states.token_mass([0, 1], llama.config.vocab_size)
    kept = (
        states.batch([0], 0).top_probabilities.sum() + states.batch([1], 0).top_probabilities.sum()
    )
    assert mass.sum() == pytest.approx(float(kept), rel=1e-3)


def test_batches_from_memory_are_those_from_disk(llama: PreTrainedModel, tmp_path: Path) -> None:
    states = open_states(llama, tmp_path)
    states.batch([0, 1], 0)  # not recorded yet: what is read now must not stay
    states.record(BaseShell(llama), progress=False)
    config = llama.config.get_text_config()
    disk = BaseStates(
        tmp_path, states.documents, [-1, 0], config.hidden_size, cache_bytes=0
    )  # fmt: skip
    for rows in ([0, 3], [3, 0, 1], [0, 3]):
        for layer in (-1, 0):
            found, expected = states.batch(rows, layer), disk.batch(rows, layer)
            for name, value in vars(expected).items():
                # NaN, which the spread of the embedding is, is not itself.
                one, other = (t.nan_to_num(-1.0) for t in (getattr(found, name), value))
                assert torch.equal(one, other), name
            assert expected.states.any()
    assert states._features.hits > 0
    assert disk._features.hits == 0


def test_only_what_is_needed_is_recorded(llama: PreTrainedModel, tmp_path: Path) -> None:
    shell = BaseShell(llama)
    whole = open_states(llama, tmp_path / "whole")
    whole.record(shell, progress=False)
    states = open_states(llama, tmp_path / "some")
    states.record(shell, rows=[3, 1], progress=False)
    for i in (1, 3):
        torch.testing.assert_close(
            states.batch([i], 0).states, whole.batch([i], 0).states, rtol=1e-2, atol=1e-2
        )
    assert not states.batch([0], 0).states.any()
    states.record(shell, rows=[0], progress=False)  # another part has a count of its own
    torch.testing.assert_close(
        states.batch([0], 0).states, whole.batch([0], 0).states, rtol=1e-2, atol=1e-2
    )
    states.record(shell, progress=False)
    torch.testing.assert_close(
        states.batch([2, 4], 0).states, whole.batch([2, 4], 0).states, rtol=1e-2, atol=1e-2
    )


def test_a_part_of_what_is_all_there_is_not_recorded_again(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = BaseShell(llama)
    states = open_states(llama, tmp_path)
    for part in ((0, 2), (1, 2)):
        states.record(shell, part=part, progress=False)
    monkeypatch.setattr(shell, "prologue", pytest.fail)
    states.record(shell, rows=[1, 3], progress=False)


def test_any_number_of_processes_goes_on_and_a_line_cut_off_does_not_count(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = BaseShell(llama)
    open_states(llama, tmp_path).record(shell, part=(1, 2), progress=False)
    marker = tmp_path / "done-1-2"
    own = [int(i) for i in marker.read_text().split()]
    marker.write_text(marker.read_text() + "0")  # its states were never flushed
    recorded = note_rows(monkeypatch)
    open_states(llama, tmp_path).record(shell, progress=False)
    assert own
    assert sorted(recorded) == sorted(set(range(5)) - set(own))
