r"""Triton kernels of the search for nearest neighbours: the largest dot product of each row with the others, and whose.

For panels u_i [m, D] and u_j [n, D] of rows in fp32, each program forms one tile of their similarities in an fp32
accumulator and takes from it, while it is in registers, the largest of each of its rows and of each of its columns with
its place: similarities are symmetric, so that the columns of a tile above the diagonal are rows of the one that mirrors
it and need not be multiplied. Nothing of the tile is written. What the programs find goes to a buffer with one slot per
block; a second, small launch goes through the slots in their order and moves on to strictly larger values only. Of
equal similarities the one with the smallest place is therefore taken, and the result is bitwise reproducible.

Budget per element: 2 D FLOP, and what finds maxima: maximum, comparison with it, selection and minimum of places, for
rows and for columns. Compiled for sm_90 and followed through the code, not timed, in tf32 for D = 768: 50 instructions,
19 of them in the loop of the product and 28 in the epilogue, 9 on the diagonal, where columns are rows; without tensor
cores the product alone takes 900. Global memory: (1 / block_m + 1 / block_n) D elements read, shared in L2 by the
grouped order of the programs; 8 / block_n + 8 / block_m bytes of what was found.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.configs import CONFIGS, Config, choose_config, product_kind
from ssl_kernels.kernels.tiles import cdiv, locate_tile, on_device, operands, similarities, suited, tile_constants

__all__ = ["CONFIGS", "NUM_WARPS", "Config", "kernel_constants", "koleo_panel"]

NUM_WARPS = 8  # also of small tiles, which others give 4: a thread holds places beside similarities, and would spill
_MERGE_ROWS = 256


# The sizes change from panel to panel and batch to batch: specialising on them would recompile.
@triton.jit(do_not_specialize=["m", "n"])
def _koleo_panel_kernel(
    X,  # [m, D]; this and Y perhaps as descriptors, see operands
    Y,  # [n, D]
    ROW_BEST,  # [cdiv(n, BLOCK_N), m] fp32
    ROW_PLACE,  # likewise int32: columns of the panel
    COL_BEST,  # [cdiv(m, BLOCK_M), n] fp32, or None with ON_DIAGONAL
    COL_PLACE,  # likewise int32: rows of the panel
    m: tl.int64,
    n: tl.int64,
    D,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    ON_DIAGONAL: tl.constexpr,  # y is x: a row is not its own neighbour, and columns are rows
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block_m, block_n = locate_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = block_m.to(tl.int64) * BLOCK_M
    first_col = block_n.to(tl.int64) * BLOCK_N
    raw = similarities(
        X, Y, m, n, D, first_row, first_col, stride_xm, stride_xd, stride_yn, stride_yd,
        EVEN_D, DESCRIPTORS, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # Within the block everything is counted in 32 bits.
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    row_ok = row < tl.minimum(m - first_row, BLOCK_M).to(tl.int32)
    col_ok = col < tl.minimum(n - first_col, BLOCK_N).to(tl.int32)
    counts = row_ok[:, None] & col_ok[None, :]
    if ON_DIAGONAL:
        counts = counts & ((row + (first_row - first_col).to(tl.int32))[:, None] != col[None, :])
    raw = tl.where(counts, raw, float("-inf"))

    best = tl.max(raw, axis=1)
    place = tl.min(tl.where(raw == best[:, None], col[None, :], BLOCK_N), axis=1)
    slot = block_n.to(tl.int64) * m + first_row
    tl.store(ROW_BEST + slot + row, best, mask=row_ok)
    tl.store(ROW_PLACE + slot + row, first_col.to(tl.int32) + place, mask=row_ok)
    if not ON_DIAGONAL:
        best = tl.max(raw, axis=0)
        place = tl.min(tl.where(raw == best[None, :], row[:, None], BLOCK_M), axis=0)
        slot = block_m.to(tl.int64) * n + first_col
        tl.store(COL_BEST + slot + col, best, mask=col_ok)
        tl.store(COL_PLACE + slot + col, first_row.to(tl.int32) + place, mask=col_ok)


@triton.jit(do_not_specialize=["size", "slots", "first"])
def _merge_kernel(
    FOUND,  # [slots, size] fp32
    PLACE,  # [slots, size] int32
    BEST,  # [size] fp32
    NEIGHBOR,  # [size] int64
    size: tl.int64,
    slots: tl.int64,
    first: tl.int64,  # what place 0 is among all rows
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ok = row < size
    best = tl.load(BEST + row, mask=row_ok, other=0.0)
    neighbor = tl.load(NEIGHBOR + row, mask=row_ok, other=0)
    for slot in range(slots):
        found = tl.load(FOUND + slot * size + row, mask=row_ok, other=0.0)
        place = tl.load(PLACE + slot * size + row, mask=row_ok, other=0)
        larger = found > best
        best = tl.where(larger, found, best)
        neighbor = tl.where(larger, first + place, neighbor)
    tl.store(BEST + row, best, mask=row_ok)
    tl.store(NEIGHBOR + row, neighbor, mask=row_ok)


def koleo_panel(
    x: Tensor,
    y: Tensor,
    best: Tensor,
    neighbor: Tensor,
    first_row: int,
    first_col: int,
    *,
    config: Config | None = None,
) -> None:
    """Bring up to date what is known of the rows in two panels of one matrix, by their similarities.

    Args:
        x: rows [m, D] in fp32, any strides, finite; m, less than 2^31, and D at least 1.
        y: columns [n, D], likewise.
        best: [B] fp32, the largest similarity of each row of the matrix so far; -inf at first.
        neighbor: [B] int64, contiguous as ``best``: whose it is.
        first_row: which row of the matrix the first of ``x`` is.
        first_col: that of ``y``; equal to ``first_row`` if ``y`` is ``x``.
        config: an entry of CONFIGS, by default the one that :func:`choose_config` names.
    """
    (m, width), n = x.shape, y.shape[0]
    on_diagonal = first_row == first_col

    def launch(config: Config) -> tuple[Tensor, ...]:
        """The best of each row by column block and their places, and those of the columns by row block."""
        config = suited(config, x, y)
        blocks_m, blocks_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
        rows, cols = _slots(blocks_n, m, x), () if on_diagonal else _slots(blocks_m, n, x)
        with on_device(x.device):
            _koleo_panel_kernel[(blocks_m * blocks_n,)](
                *operands(config, x, y, None)[:2], *rows, *(cols or (None, None)), m, n, width,
                *x.stride(), *y.stride(),
                **kernel_constants(config, product_kind(x), width, on_diagonal),
                num_warps=NUM_WARPS, num_stages=config.num_stages,
            )  # fmt: skip
        return (*rows, *cols)

    config = config or choose_config("koleo", x, y, None, launch)
    row_best, row_place, *cols = launch(config)
    with on_device(x.device):
        _merge(row_best, row_place, best[first_row:], neighbor[first_row:], first_col)
        if cols:
            col_best, col_place = cols
            _merge(col_best, col_place, best[first_col:], neighbor[first_col:], first_row)


def _slots(blocks: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.empty(blocks, size, dtype=torch.float32, device=like.device)
    return found, torch.empty_like(found, dtype=torch.int32)


def _merge(found: Tensor, place: Tensor, best: Tensor, neighbor: Tensor, first: int) -> None:
    slots, size = found.shape
    _merge_kernel[(cdiv(size, _MERGE_ROWS),)](
        found, place, best, neighbor, size, slots, first, BLOCK=_MERGE_ROWS, num_warps=4
    )


def kernel_constants(config: Config, kind: str, width: int, on_diagonal: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel. What is not wanted is not compiled in."""
    return {**tile_constants(config, kind, width), "ON_DIAGONAL": on_diagonal}
