"""Memory on the CPU that the next step reuses.

Memory of tens of megabytes goes back to the system when it is freed, and the next step pays for every page of it again:
for the gradient of DINO's logits as much time as for computing it. So the memory of the last few outputs is held, and
given out again once no tensor uses it any more, as the allocators of GPUs do. Tiles, which are many and alike, are held
as they are, and freed just before as many are made.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import ClassVar

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
        self.window: weakref.ref[np.ndarray] | None = None

    def is_free(self) -> bool:
        """Whether the array that was given to torch is gone: a storage owns it, which lives as long as any tensor,
        view, NumPy array or capsule over it, in whatever thread, and lets go of it as the last thing that it does."""
        return self.window is None or self.window() is None

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self.size <= 2 * nbytes and self.is_free()

    def is_outgrown(self, nbytes: int) -> bool:
        return self.size < nbytes <= 2 * self.size and self.is_free()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        start = -self.bytes.ctypes.data % _ALIGNMENT
        nbytes = math.prod(shape) * dtype.itemsize
        window = self.bytes[start : start + nbytes]
        self.window = weakref.ref(window)
        return torch.from_numpy(window).view(dtype).view(*shape)


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


def let_go() -> None:
    """Free all that is held for a next step."""
    with _lock:
        _held.clear()
    for tiles in HeldTiles.everywhere:
        tiles.free_down_to(0)


def fit_budget() -> None:
    """Free what is held beyond the present tile budget, and all of it if that is 0."""
    budget = tile_budget_bytes()
    warm.free_down_to(budget)
    if budget == 0:
        with _lock:
            _held.clear()


class KeptTiles:
    """Tiles that one pass leaves to the next, within a budget, and whose memory then waits for the next call.

    Malloc serves that call from memory that is mapped. Fresh memory is paid for in page faults, for 64 MB as much time
    as the product that a kept tile saves at D = 128.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._left = self._budget = budget_bytes
        self._tiles: dict[tuple[int, ...], Sequence[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._tiles)

    def has_room(self, nbytes: int) -> bool:
        return nbytes <= self._left

    def make_room(self) -> None:
        """Before a tile is made."""
        if self._left:
            warm.free_one()

    def keep(self, key: tuple[int, ...], tiles: Sequence[Tensor]) -> None:
        nbytes = sum(tile.nbytes for tile in tiles)
        if self.has_room(nbytes):
            self._left -= nbytes
            self._tiles[key] = tiles

    def take(self, key: tuple[int, ...]) -> Sequence[Tensor] | None:
        tiles = self._tiles.pop(key, None)
        for tile in tiles or ():
            if tile.device.type == "cpu":
                warm.hold(tile, self._budget)
        return tiles


class HeldTiles:
    """Tiles that are kept from malloc until the next ones are made, at most so many bytes in the whole process."""

    everywhere: ClassVar[weakref.WeakSet[HeldTiles]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.everywhere.add(self)
        self.nbytes = 0
        self._tiles: list[Tensor] = []
        self._lock = threading.Lock()

    def hold(self, tile: Tensor, most_bytes: int) -> None:
        """Hold a tile too, unless that were more than ``most_bytes`` of all threads."""
        with self._lock:
            if self.nbytes + tile.nbytes <= most_bytes:
                self._tiles.append(tile)
                self.nbytes += tile.nbytes

    def free_one(self) -> None:
        with self._lock:
            if self._tiles:
                self.nbytes -= self._tiles.pop().nbytes

    def free_down_to(self, most_bytes: int) -> None:
        while self.nbytes > most_bytes:
            self.free_one()


warm = HeldTiles()  # of KeptTiles
