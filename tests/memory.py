"""Peak memory of a call and bytes kept for backward, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ssl_kernels.bench.memory import peak_mb
from ssl_kernels.ops import matmul, panels, row_passes

__all__ = ["leave_out_onednn", "linux_only", "peak_mb", "saved_bytes"]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")


def leave_out_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would be used: it writes each product to memory of its own, and the gradient of y, which is made
    transposed for it, is copied at the end."""
    for module in (matmul, panels, row_passes):
        monkeypatch.setattr(module, "onednn_is_faster", lambda: False)


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
