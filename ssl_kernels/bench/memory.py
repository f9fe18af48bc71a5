"""Peak memory of a call on the CPU, read from Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_USUAL_THRESHOLD = 2**25  # that glibc comes to in time, and the most that it takes
_MAPPED = 2  # the bit of a chunk's header that tells a mapping of its own from a piece of the heap
_LEAST, _MOST = 2**17, 2**26  # bytes; smaller pieces add little, larger ones do not lie in a heap
_MARKS = Path("/proc/self/clear_refs")


def is_readable() -> bool:
    """Whether this system tells a process of its peak: Linux does."""
    return os.access(_MARKS, os.W_OK)


def settle_allocator() -> None:
    """Where large blocks come from, and when they go back to the system: from now on as in a process that is old.

    Else glibc learns it from what is freed, and the first times of a run would be taken with another allocator than the
    last.
    """
    if is_readable():
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_THRESHOLD)


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def peak_mb(call: Callable[[], Any], *, calls: int = 1) -> float:
    """Resident megabytes that ``call`` reaches above what the process holds before it.

    That counts the buffers that a library for matrix products makes once and keeps, too: where it matters, this is the
    least of several ``calls``.
    """
    return min(_peak_mb(call) for _ in range(calls))


def _peak_mb(call: Callable[[], Any]) -> float:
    gc.collect()
    with _every_large_block_mapped_afresh():
        _MARKS.write_text("5")  # resets the high-water mark
        before, files = _status_mb("VmRSS"), _status_mb("RssFile")
        result = call()
        peak = _status_mb("VmHWM") - before - max(0.0, _status_mb("RssFile") - files)  # pages of libraries, read anew
    del result
    return peak


@contextmanager
def _every_large_block_mapped_afresh() -> Iterator[None]:
    """Inside the block a tensor's memory comes from the system and goes back to it, as in a new process.

    The heap of an old process has gaps. A step that frees one tile and asks for the next, smaller one gets another gap,
    and the pages of the first stay resident: a peak of 13 MB reads as 80. So the gaps are taken, untouched, meanwhile.
    No time that is taken in here says anything.
    """
    libc = ctypes.CDLL("libc.so.6")  # by name: were another allocator preloaded, there would be no gaps here to take
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(_M_MMAP_THRESHOLD, _LEAST)
    libc.malloc_trim(0)  # the pages of the gaps go back
    taken = []
    size = _MOST
    while size >= _LEAST:
        taken.append(libc.malloc(size))
        if ctypes.c_size_t.from_address(taken[-1] - ctypes.sizeof(ctypes.c_size_t)).value & _MAPPED:
            libc.free(taken.pop())  # no gap is this large
            size //= 2
    try:
        yield
    finally:
        for block in taken:
            libc.free(block)
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL_THRESHOLD)
