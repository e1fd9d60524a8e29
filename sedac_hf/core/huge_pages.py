"""Weights in huge pages: a pass reads all of them for every token, and looks up each page.

With pages of 4 KiB a processor core looks up 65,000 pages for 269 MB; in a virtual machine that
took a quarter of a pass. Pages are joined where they lie: addresses and contents stay as they are.

Few kernels join pages of files, and weights are often a file that is mapped into memory. Those are
moved out of the file's cache into memory of the process's own and put in the same place. The cache
is the kernel's to drop, but processes that shared it no longer do: so only models that are small
beside the memory that is free are moved.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["join_pages"]

_HUGE = 2 << 20
_LEAST = 8 * _HUGE  # bytes below which looking pages up costs nothing
_PIECE = 32 * _HUGE  # bytes of one step, between looks at the clock
_SECONDS = 5.0
_MOVABLE = 1 / 8  # of the memory that is available
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # the latter since Linux 6.1
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value


class _Span(NamedTuple):
    """Addresses `start` to `stop - 1`."""

    start: int
    stop: int


def join_pages(tensors: Sequence[Tensor]) -> None:
    """Ask the kernel to put tensors into huge pages; nothing happens where it cannot or will not.

    `SEDAC_HUGE_PAGES=0` in the environment turns it off. It ends after five seconds, however much
    is left: what was joined by then is faster, and nothing else changes.

    Args:
        tensors: Tensors on the CPU; nobody may write to them meanwhile.
    """
    if sys.platform != "linux" or os.environ.get("SEDAC_HUGE_PAGES") == "0":
        return
    if sum(tensor.nbytes for tensor in tensors) < _LEAST:
        return
    spans = list(_whole_pages(tensors))
    mapped = list(_of_files(spans))
    if sum(span.stop - span.start for span in mapped) <= _MOVABLE * _available():
        _until_late(mapped, _move)
    _until_late(spans, _collapse)


def _until_late(spans: Sequence[_Span], work: Any) -> None:
    begun = time.monotonic()
    for span in spans:
        for start in range(span.start, span.stop, _PIECE):
            if time.monotonic() - begun > _SECONDS:
                return
            work(_Span(start, min(start + _PIECE, span.stop)))


def _whole_pages(tensors: Sequence[Tensor]) -> Iterator[_Span]:
    """Huge pages that the tensors touch, neighbours together."""
    touched = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes)
    start = stop = 0
    for first, last in touched:
        low, high = first // _HUGE * _HUGE, -(-last // _HUGE) * _HUGE
        if low > stop:
            if stop > start:
                yield _Span(start, stop)
            start = low
        stop = max(stop, high)
    if stop > start:
        yield _Span(start, stop)


def _of_files(spans: Sequence[_Span]) -> Iterator[_Span]:
    """Whole huge pages of the spans that are a private, writable mapping of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
        if access[:2] != "rw" or access[3] != "p" or inode == "0":
            continue
        low, high = (int(part, 16) for part in addresses.split("-"))
        low, high = -(-low // _HUGE) * _HUGE, high // _HUGE * _HUGE
        for span in spans:
            start, stop = max(low, span.start), min(high, span.stop)
            if start < stop:
                yield _Span(start, stop)


def _available() -> int:
    """Bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def _collapse(span: _Span) -> None:
    _kernel().madvise(span.start, span.stop - span.start, _MADV_COLLAPSE)


def _move(span: _Span) -> None:
    """Put memory of the process's own, with the same contents, in the place of a file's."""
    kernel, size = _kernel(), span.stop - span.start
    access = mmap.PROT_READ | mmap.PROT_WRITE
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = kernel.mmap(None, size + _HUGE, access, kind, -1, 0)
    if room == _FAILED:
        return
    fresh = -(-room // _HUGE) * _HUGE
    kernel.madvise(fresh, size, _MADV_HUGEPAGE)
    ctypes.memmove(fresh, span.start, size)
    # What was there is unmapped and the copy mapped in one step of the kernel's: readers wait.
    how = _MREMAP_MAYMOVE | _MREMAP_FIXED
    moved = kernel.mremap(fresh, size, size, how, span.start) != _FAILED
    # What is left of the room, or all of it.
    kernel.munmap(room, fresh - room + (0 if moved else size))
    kernel.munmap(fresh + size, room + _HUGE - fresh)


def _kernel() -> Any:
    """The C library's calls, with the types of their arguments."""
    library: Any = ctypes.CDLL(None)
    place, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.madvise.argtypes = (place, size, number)
    library.munmap.argtypes = (place, size)
    library.mmap.argtypes = (place, size, number, number, number, ctypes.c_long)
    library.mremap.argtypes = (place, size, size, number, place)
    library.mmap.restype = library.mremap.restype = ctypes.c_void_p
    return library
