"""What the launches of one pass over panels share, so that no panel makes it anew."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssl_kernels.kernels.tiles import cdiv, gradient_tile

T = TypeVar("T")

_SHARE = 2  # of the workspace: so much of it is for partial sums that wait


class Scratch:
    """Memory of a pass, and what was found out once for panels of one shape.

    Partial sums of one panel of rows wait side by side, whatever columns they are of, and are added up together: when
    the next panel of rows begins, and when :meth:`reduce` is called, as it must be at the end of the pass. All of the
    pass could not wait: that would be memory which grows with the whole matrix.

    Args:
        columns: of the whole matrix.
        workspace: in bytes; partial sums take half of it at most, or what one panel takes.
        add: what adds partial sums [blocks, k, m] to statistics [m, k], in a fixed order; by default a sum in float64.
    """

    def __init__(self, columns: int, workspace: int, add: Callable[[Tensor, Tensor], None] | None = None) -> None:
        self._add = add or _add_sums
        self.descriptors: dict[Hashable, Any] = {}  # of tensors that these hold on to
        self._columns, self._most = columns, workspace // _SHARE // 4
        self._known: dict[Hashable, Any] = {}
        self._tile: Tensor | None = None
        self._sums: Tensor | None = None  # fp32, as are these of columns
        self._column_sums: Tensor | None = None
        self._used = 0  # of its elements
        self._stats: Tensor | None = None  # [m, k] float64, to which what waits is to be added

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned when the key was new."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    def gradient(self, like: Tensor, columns: int) -> Tensor:
        """As :func:`ssl_kernels.kernels.tiles.gradient_tile`, in memory that the next panel overwrites."""
        return self.once(("gradient", like.shape[0], columns), lambda: self._part_of_tile(like, columns))

    def _part_of_tile(self, like: Tensor, columns: int) -> Tensor:
        rows, padded = like.shape[0], cdiv(columns, 16) * 16
        if self._tile is None or self._tile.numel() < rows * padded:
            made = gradient_tile(like, columns)
            self._tile = made.as_strided((rows * padded,), (1,))
            return made
        return self._tile.as_strided((rows, columns), (padded, 1))

    def partials(self, stats: Tensor, blocks: int, columns: int) -> Tensor:
        """Memory [blocks, k, m] for partial sums of ``stats`` [m, k], in a panel of so many columns.

        It begins at a multiple of 16 bytes, for another address would compile the kernel anew.
        """
        m, k = stats.shape
        size = blocks * k * m
        room = 0 if self._sums is None else self._sums.shape[0] - self._used
        if stats is not self._stats or size > room or self._used % 4:
            self.reduce()
            self._stats = stats
        sums = self._sums
        if sums is None or size > sums.shape[0]:
            of_all_columns = size * cdiv(self._columns, columns)
            self._sums = sums = stats.new_empty(max(size, min(self._most, of_all_columns)), dtype=torch.float32)
        at = self._used
        self._used += size
        return sums.as_strided((blocks, k, m), (k * m, m, 1), at)

    def column_partials(self, stats: Tensor, blocks: int) -> Tensor:
        """Memory [blocks, k, n] for those of columns, which the next panel overwrites."""
        n, k = stats.shape
        if self._column_sums is None or self._column_sums.numel() < blocks * k * n:
            self._column_sums = stats.new_empty(blocks * k * n, dtype=torch.float32)
        return self._column_sums.as_strided((blocks, k, n), (k * n, n, 1))

    def halve(self) -> None:
        """What waits, of the first panel of its rows."""
        if self._sums is not None:
            self._sums[: self._used].mul_(0.5)

    def reduce(self) -> None:
        """Add what waits to its statistics."""
        if self._used and self._sums is not None and self._stats is not None:
            m, k = self._stats.shape
            self._add(self._sums.as_strided((self._used // (k * m), k, m), (k * m, m, 1)), self._stats)
        self._used, self._stats = 0, None


def _add_sums(partials: Tensor, stats: Tensor) -> None:
    stats += partials.sum(dim=0, dtype=torch.float64).t()
