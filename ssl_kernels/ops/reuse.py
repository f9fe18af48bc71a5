"""Memory of large outputs on the CPU that the next step reuses.

Memory of tens of megabytes goes back to the system when it is freed, and the next step pays for every page of it again:
for the gradient of DINO's logits as much time as for computing it. So the memory of the last few outputs is held, and
given out again once no tensor uses it any more, as the allocators of GPUs do.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_kernels.settings import tile_budget_bytes

_LEAST_BYTES = 4 * 2**20
_MOST_OUTPUTS = 4  # of a step: DINO's crops, iBOT's patches, and some room
_ALIGNMENT = 64


class _Memory:
    def __init__(self, nbytes: int) -> None:
        self.size = nbytes
        self.bytes = np.empty(nbytes + _ALIGNMENT, np.uint8)
        self.references_when_free = self.references()

    def references(self) -> int:
        """Every tensor over these bytes holds one, down to the last view of its storage."""
        return sys.getrefcount(self.bytes)

    def is_free(self) -> bool:
        return self.references() == self.references_when_free

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.size <= 2 * nbytes and self.is_free()

    def is_outgrown(self, nbytes: int) -> bool:
        return self.size < nbytes <= 2 * self.size and self.is_free()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        start = -self.bytes.ctypes.data % _ALIGNMENT
        nbytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(self.bytes[start : start + nbytes]).view(dtype).view(*shape)


_held: list[_Memory] = []
_lock = threading.Lock()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and device of ``like``, in memory of an earlier one where that is free.

    With a tile budget of 0 nothing is held, and what was held is let go.
    """
    nbytes = math.prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or nbytes < _LEAST_BYTES:
        return like.new_empty(shape)
    with _lock:
        if tile_budget_bytes() == 0:
            _held.clear()
            return like.new_empty(shape)
        memory = next((memory for memory in _held if memory.fits(nbytes)), None)
        if memory is None:
            # An output whose size varies, as with iBOT's patches, has one memory: that of the largest so far.
            _held[:] = [memory for memory in _held if not memory.is_outgrown(nbytes)]
            memory = _Memory(nbytes)
            _held.append(memory)
            del _held[:-_MOST_OUTPUTS]
        return memory.tensor(shape, like.dtype)
