"""How many rows and columns a panel has.

On a CPU a tile stays in the last-level cache until both gradients have been made of it. On a GPU the tile of wide
features need not: with it in 16 bits, its products do D FLOP for each byte that they read of it, more than memory asks
for from D = 256 on. There, panels are few and large, for each costs the host its launches, and of a shape whose
products leave few multiprocessors idle in the last of their waves. For narrow features the tile stays in the L2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch

_SIDE_CPU = 1024  # 1024 x 1024 fp32 is 4 MB: in the last-level cache, with long enough inner products
_L2_BYTES = 50 * 2**20  # of a GPU that does not say, as of an H100
_GPU_MULTIPLE = 256  # a whole number of the tiles of every kernel
_WHOLE_ROWS_BYTES = (8 * 2**20, 24 * 2**20)  # of a tile with all columns on a CPU: a small one, and the most
_WHOLE_ROWS = (256, 512, 1024)  # of one: the fewest whose products are fast enough, what it has if that fits, the most
_SYMMETRIC_PANELS = 8  # at least so many where size allows: tiles on the diagonal are visited whole, 1/8 of the work
_LEAST_SYMMETRIC = {"cpu": 256, "cuda": 4096}  # but no smaller: on a GPU a launch costs the host more than the work
_WIDE = 256  # features
_MOST_COLUMNS = 16_384
_TILE = (128, 256)  # rows and columns of the products of a multiprocessor, and FLOP per clock of it, as on an H100
_FLOP = 4096
_LAUNCHES = 5 * 10_000  # clocks to launch what a panel takes


def panel_shape(
    rows: int,
    cols: int,
    width: int,
    bytes_per_element: int,
    device: torch.device,
    workspace: int,
    symmetric: bool = False,
) -> tuple[int, int]:
    """Rows and columns of a panel: square by preference, evened out over the matrix; squares if that is symmetric.

    The tile fits a workspace of so many bytes, and so does a panel of ``width`` features in fp32, which a conversion or
    a product may have to hold. A tile of no bytes is not written: what is written instead, by rows and columns of
    blocks, takes about a byte per element at most.
    """
    limit = max(1, workspace // max(1, bytes_per_element))
    longest = max(1, workspace // (4 * max(1, width)))
    is_wide = device.type == "cuda" and width >= _WIDE
    if is_wide and limit >= _GPU_MULTIPLE**2 and longest >= _GPU_MULTIPLE:
        if symmetric:
            writes, longest = bytes_per_element > 0, min(math.isqrt(limit), longest)
            return _square_in_whole_waves(rows, width, longest, writes, _multiprocessors(device))
        if bytes_per_element:
            return _in_whole_waves(rows, cols, width, limit, longest, _multiprocessors(device))
    side = math.isqrt(limit)
    if bytes_per_element and not is_wide:
        side = min(side, _cached_side(device, bytes_per_element))
    if symmetric:
        side = min(side, max(_LEAST_SYMMETRIC.get(device.type, 256), rows // _SYMMETRIC_PANELS))
    panel_rows = _even_split(rows, min(side, longest))
    if symmetric:
        return panel_rows, panel_rows
    panel_cols = _even_split(cols, min(side * side // panel_rows, longest))
    return panel_rows, panel_cols


def whole_rows(rows: int, cols: int, bytes_per_element: int, workspace: int) -> int:
    """How many rows a panel has on a CPU whose tile has all columns; 0 if so few fit the workspace that two visits of
    square tiles, with a product more, are faster."""
    least, usual, most = (min(rows, n) for n in _WHOLE_ROWS)
    of_row = max(1, cols * bytes_per_element)
    small, large = (nbytes // of_row for nbytes in _WHOLE_ROWS_BYTES)
    sixth = -(-rows // 96) * 16  # so that what is not small is not much of the matrix
    fit = min(workspace // of_row, max(usual, min(most, large, max(small, sixth))))
    return _even_split(rows, fit) if fit >= least else 0


@functools.cache
def _cached_side(device: torch.device, bytes_per_element: int) -> int:
    """The side of a square tile that stays in cache until both gradients have been made of it.

    On a GPU it has two thirds of the L2, 4096 x 4096 in 16 bits on an H100. A ROCm device tells of the L2 of one of its
    dies, not of the cache of 256 MB behind them, so it gets what an H100 does.
    """
    if device.type == "cpu":
        return _SIDE_CPU
    l2 = _L2_BYTES
    if device.type == "cuda" and torch.version.hip is None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size or l2
    side = math.isqrt(l2 * 2 // 3 // bytes_per_element)
    return max(side // _GPU_MULTIPLE, 1) * _GPU_MULTIPLE


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=256)
def _in_whole_waves(
    rows: int, cols: int, width: int, limit: int, longest: int, multiprocessors: int
) -> tuple[int, int]:
    """The panel of at most ``limit`` elements that takes the fewest clocks by the model, the largest of equals."""
    best = (math.inf, 0, 0)
    for n in _lengths(cols, min(max(_MOST_COLUMNS, limit // rows), longest, limit // _GPU_MULTIPLE)):
        for m in _lengths(rows, min(limit // n, longest)):
            best = min(best, (clocks(rows, cols, width, m, n, multiprocessors), -m, -n))
    _, m, n = best
    return -m, -n


@functools.lru_cache(maxsize=256)
def _square_in_whole_waves(rows: int, width: int, longest: int, writes: bool, multiprocessors: int) -> tuple[int, int]:
    """The same of squares, where tiles below the diagonal mirror those above it; with gradients if it writes tiles."""
    sides = _lengths(rows, longest)
    side = min(sides, key=lambda side: (clocks_of_half(rows, width, side, multiprocessors, writes), -side))
    return side, side


def _lengths(size: int, most: int) -> list[int]:
    """Multiples of 256 up to ``most``, and the whole if it fits."""
    lengths = [*range(_GPU_MULTIPLE, min(size, most + 1), _GPU_MULTIPLE)][-24:]
    return [*lengths, size] if size <= most else lengths


def clocks(rows: int, cols: int, width: int, m: int, n: int, multiprocessors: int) -> float:
    """What all panels of a loss with both gradients take, by waves of tiles and launches: a model, no measurement."""
    return sum(
        count_m * count_n * panel_clocks(part_m, part_n, width, multiprocessors)
        for part_m, count_m in _parts(rows, m)
        for part_n, count_n in _parts(cols, n)
    )


def clocks_of_half(rows: int, width: int, side: int, multiprocessors: int, gradients: bool = True) -> float:
    """The same of a symmetric matrix of similarities. A tile on the diagonal is visited whole, and has one product with
    G; without ``gradients`` no tile has one."""

    def tile(m: int, n: int, products: int) -> float:
        shapes = (m, n, width), (m, width, n), (width, n, m)
        return _clocks(shapes[: 1 + products * gradients], multiprocessors)

    total, before = 0.0, 0
    for length, count in _parts(rows, side):
        above = count * (count - 1) // 2 * tile(length, length, 2)
        beside = before * count * tile(side, length, 2)
        total += count * tile(length, length, 1) + above + beside
        before = count
    return total


def panel_clocks(m: int, n: int, width: int, multiprocessors: int) -> float:
    """Similarities [m, n], and the products with G that make the gradients [m, D] and, transposed, [D, n]."""
    return _clocks(((m, n, width), (m, width, n), (width, n, m)), multiprocessors)


def _clocks(shapes: Iterable[tuple[int, int, int]], multiprocessors: int) -> float:
    return sum(product_clocks(*shape, multiprocessors) for shape in shapes) + _LAUNCHES


def product_clocks(rows: int, cols: int, depth: int, multiprocessors: int) -> float:
    tiles = math.ceil(rows / _TILE[0]) * math.ceil(cols / _TILE[1])
    return math.ceil(tiles / multiprocessors) * 2 * _TILE[0] * _TILE[1] * depth / _FLOP


def _parts(size: int, step: int) -> list[tuple[int, int]]:
    """The lengths of panels, and how many there are of each."""
    whole, rest = divmod(size, step)
    return [(length, count) for length, count in ((step, whole), (rest, 1)) if length * count]


def _even_split(size: int, limit: int) -> int:
    """The panel length, at most ``limit``, that cuts ``size`` into the fewest panels of nearly equal length."""
    if size <= limit:
        return size
    even = -(-size // -(-size // limit))
    return min(limit, -(-even // 16) * 16)
