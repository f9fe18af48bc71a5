"""Peak memory of a call and bytes kept for backward, on the CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_M_MMAP_THRESHOLD = -3  # of malloc.h

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def peak_mb(call: Callable[[], Any], *, calls: int = 1) -> float:
    """Resident megabytes that ``call`` reaches above what the process holds before it.

    That counts what is not its own as well: pages of libraries that the system had taken back, and buffers that a
    library for matrix products makes once and keeps. Where it matters, this is the least of several ``calls``.
    """
    return min(_peak_mb(call) for _ in range(calls))


def _peak_mb(call: Callable[[], Any]) -> float:
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**20)  # what is larger is given back once it is freed, and does not wait in a heap
    libc.malloc_trim(0)  # memory that was freed before must not serve the call unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mb("VmRSS")
    result = call()
    peak = _status_mb("VmHWM") - before
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
    del result
    return peak


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Collects the size of each distinct storage that autograd saves inside the block."""
    sizes: list[int] = []
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
