"""TensorBuffer: the memory that is handed over is the memory that arrives."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from sedac_hf._core import TensorBuffer


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "int64", "int16", "uint16", "uint8", "bool"]
)
def test_an_array_stays_where_it_is(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    expected = array.copy()
    buffer = TensorBuffer(array)
    assert buffer.address == array.ctypes.data
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((2, 3), dtype, array.nbytes)
    back = np.asarray(buffer)
    assert back.ctypes.data == array.ctypes.data
    assert back.dtype == array.dtype
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_a_tensor_stays_where_it_is(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    buffer = TensorBuffer(tensor)
    assert buffer.address == tensor.data_ptr()
    assert np.asarray(buffer).ctypes.data == tensor.data_ptr()
    assert torch.equal(torch.from_numpy(np.asarray(buffer).copy()), tensor)


def test_bfloat16_travels_as_its_bits() -> None:
    tensor = torch.randn(3, 4).bfloat16()
    with pytest.raises(TypeError, match="int16"):
        TensorBuffer(tensor)
    assert TensorBuffer(tensor.view(torch.int16)).address == tensor.data_ptr()


def test_what_was_handed_over_is_not_written_to_any_more() -> None:
    array = np.zeros(3, np.float32)
    TensorBuffer(array)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1.0


def test_the_memory_lives_as_long_as_anybody_looks_at_it() -> None:
    array = np.full(1 << 16, 7.0, np.float32)
    owner = weakref.ref(array)
    buffer = TensorBuffer(array)
    del array
    gc.collect()
    assert owner() is not None
    view = np.asarray(buffer)
    del buffer
    gc.collect()
    assert owner() is not None
    assert float(view.sum()) == 7.0 * (1 << 16)
    del view
    gc.collect()
    assert owner() is None


def test_a_tensor_without_elements_is_one() -> None:
    assert TensorBuffer(np.zeros((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([1.0, 2.0], "list"),
        (np.zeros((3, 4), np.float32).T, "gaps"),
        (np.zeros(3, np.int32), "int32"),
        (np.zeros(3, np.complex64), "complex64"),
        (np.zeros(3, ">f4"), ">f4"),
        (torch.zeros(3, requires_grad=True), "detach"),
    ],
)
def test_what_would_have_to_be_copied_is_refused(source: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        TensorBuffer(source)
