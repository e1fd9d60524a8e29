"""Pages are joined where they lie: addresses, contents and files stay as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sedac_hf.core import huge_pages as module
from sedac_hf.core.huge_pages import join_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages of Linux")

COUNT = 6 << 20  # 24 MB of f32: some whole huge pages wherever it lies


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(COUNT, dtype=torch.int32).numpy().tobytes())
    return path


def mapped(path: Path, shared: bool = False) -> Tensor:
    return torch.from_file(str(path), shared=shared, size=COUNT, dtype=torch.int32)


def of_file(path: Path) -> int:
    """Bytes of this process that are a mapping of a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if str(path) in line]
    return sum(int(high, 16) - int(low, 16) for low, high in spans)


def test_a_private_mapping_becomes_memory_of_our_own_in_the_same_place(file: Path) -> None:
    tensor = mapped(file)
    view, address = tensor[5:], tensor.data_ptr()
    before = of_file(file)
    join_pages([tensor])
    assert before - of_file(file) >= 16 << 20
    assert (tensor.data_ptr(), view.data_ptr()) == (address, address + 20)
    assert torch.equal(tensor, torch.arange(COUNT, dtype=torch.int32))
    view.zero_()
    assert int(tensor[5:].sum()) == 0
    assert torch.equal(mapped(file), torch.arange(COUNT, dtype=torch.int32)), "not written to"
    del tensor, view
    assert of_file(file) == 0


def test_what_is_shared_with_others_stays(file: Path) -> None:
    tensor = mapped(file, shared=True)
    before = of_file(file)
    join_pages([tensor])
    assert of_file(file) == before
    tensor[0] = 7
    assert int(mapped(file)[0]) == 7, "writes still reach the file"


@pytest.mark.parametrize("why", ["variable", "memory", "time", "small"])
def test_mappings_stay_where_they_are_not_to_be_moved(
    file: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "variable":
        monkeypatch.setenv("SEDAC_HUGE_PAGES", "0")
    elif why == "memory":
        monkeypatch.setattr(module, "_available", lambda: 8 * (16 << 20) - 1)
    elif why == "time":
        monkeypatch.setattr(module, "_SECONDS", -1.0)
    tensor = mapped(file)
    before = of_file(file)
    join_pages([tensor[:1000]] if why == "small" else [tensor])
    assert of_file(file) == before
    assert torch.equal(tensor, torch.arange(COUNT, dtype=torch.int32))


def test_ordinary_memory_keeps_addresses_and_contents() -> None:
    tensors = [torch.randn(3 << 20), torch.randn(3 << 20), torch.randn(5)]
    copies, addresses = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    join_pages(tensors)
    assert [t.data_ptr() for t in tensors] == addresses
    assert all(map(torch.equal, tensors, copies))
