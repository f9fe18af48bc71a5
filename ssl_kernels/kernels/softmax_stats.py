r"""Triton tile kernel of the softmax contrastive losses, first visit: statistics of rows and columns (see softmax.py).

e = 2^(t (raw - c)) against the maximum c of the tile serves rows and columns alike: maximum, subtraction,
multiplication, ex2 and two additions. The difference comes first: t raw less a rounded t c, as one fma, would leave the
rounding, which exceeds 1 where logits are large. A sum of at least 2^-90 has lost terms below 2^-126 to underflow,
2^-28 of it at most for 256 terms. If any row or column of the tile has less, the program takes each against its own
maximum instead: exact for every scale, and rare, since it takes logits that are 62 apart within one tile. Where column
sums are not wanted, rows have their own maximum to begin with.

The maximum that is kept for a row or column is that of the tiles that it met: at least its own, at most 68 more.

The partial statistics of each block go to a buffer with one slot per block, which a second, small launch merges into
the running statistics in float64, in a fixed order: the result is bitwise reproducible. Those of the columns are merged
panel by panel, those of the rows once for all panels of these rows that fit the buffer.

Budget per element: 21 instructions, 5 of them in the loop of the product, 14 where columns are not wanted. Written: for
label smoothing 24, else 16 bytes times 1 / block_m + 1 / block_n.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.configs import Config, choose_config, device_traits, product_kind
from ssl_kernels.kernels.scratch import Scratch
from ssl_kernels.kernels.softmax import config_for
from ssl_kernels.kernels.tiles import (
    cdiv,
    diagonal_in_block,
    finite_from_below,
    have_same_id,
    left_in_block,
    locate_tile,
    nearest_diagonal,
    on_device,
    operands,
    pair_constants,
    similarities,
    split_columns,
    suited,
)

__all__ = ["kernel_constants", "merge_statistics", "softmax_stats"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST_SUM = tl.constexpr(2.0**-90)
_LEAST_SCALE = tl.constexpr(2.0**-126)
_MERGE_ROWS = 32
_MERGE_BLOCKS = 32


@triton.jit
def _load_scale(SCALE):
    """As it is but for 0, which would make NaN of the -inf of a pair that is left out, and for negative numbers, which
    would make the largest product the least z: these are NaN."""
    scale = tl.load(SCALE)
    scale = tl.where(scale < 0.0, float("nan"), scale)
    return tl.where(scale == 0.0, _LEAST_SCALE, scale)


@triton.jit
def _sum_exp2(raw, scale, AXIS: tl.constexpr):
    """Maxima along an axis, and sums of 2^(scale (raw - maximum))."""
    maximum = tl.max(raw, axis=AXIS)
    shift = tl.expand_dims(finite_from_below(maximum), AXIS)
    return maximum, tl.sum(tl.exp2((raw - shift) * scale), axis=AXIS)


@triton.jit
def _kept(row, col, rows_left, cols_left, excluded_at):
    """Pairs within the panel and off the diagonal that is left out."""
    return (row < rows_left)[:, None] & (col < cols_left)[None, :] & (col[None, :] != (row + excluded_at)[:, None])


@triton.jit
def _stats_epilogue(
    raw,  # [BLOCK_M, BLOCK_N] fp32
    COL_PARTIALS,
    X_IDS,
    Y_IDS,
    scale,
    m,
    n,
    positive,
    excluded,
    block_m,
    first_row,
    first_col,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    WITH_COLS: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the columns' statistics of a block and return those of its rows, each [BLOCK_M]."""
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    rows_left = left_in_block(m, first_row, BLOCK_M)
    cols_left = left_in_block(n, first_col, BLOCK_N)
    positive_at = diagonal_in_block(positive, first_row, first_col, BLOCK_M, BLOCK_N)
    excluded_at = diagonal_in_block(excluded, first_row, first_col, BLOCK_M, BLOCK_N)
    is_edge = (rows_left < BLOCK_M) | (cols_left < BLOCK_N)
    has_positive = (positive_at > -BLOCK_M) & (positive_at < cols_left) & (positive != excluded)
    has_excluded = (excluded_at > -BLOCK_M) & (excluded_at < cols_left)
    POSITIVE_IDS: tl.constexpr = HAS_IDS and not IGNORE_SAME_ID

    # Column sums are stored as soon as they are made: held to the end, six of them take more registers than the tile.
    col_at = COL_PARTIALS
    col_ok = col < cols_left
    if WITH_COLS:
        col_at += block_m.to(tl.int64) * STATS * n + first_col + col

    # A pair that is left out is 0 in the sums of raw, as 0 times a NaN or an infinity would count, and then -inf. With
    # ids that is decided element by element without a branch, across which the masks would be kept in registers.
    row_pairs = tl.zeros((BLOCK_M,), tl.float32) + cols_left
    col_pairs = tl.zeros((BLOCK_N,), tl.float32) + rows_left
    row_raw = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_IDS:
        is_positive = col[None, :] == (row + positive_at)[:, None]
        same_id = have_same_id(X_IDS, Y_IDS, first_row, first_col, row, col, row < rows_left, cols_left)
        kept = _kept(row, col, rows_left, cols_left, excluded_at)
        if IGNORE_SAME_ID:
            kept = kept & (is_positive | (same_id == 0))
        else:
            is_positive = (is_positive | same_id) & kept
        summed = tl.where(kept, raw, 0.0)
        raw = tl.where(kept, raw, float("-inf"))
        if STATS == 6:
            row_pairs = tl.sum(kept.to(tl.float32), axis=1)
            if WITH_COLS:
                col_pairs = tl.sum(kept.to(tl.float32), axis=0)
            row_raw = tl.sum(summed, axis=1)
            if WITH_COLS:
                tl.store(col_at + 4 * n, tl.sum(summed, axis=0), mask=col_ok)
    else:
        if STATS == 6:
            summed = raw
            if is_edge | has_excluded:
                summed = tl.where(_kept(row, col, rows_left, cols_left, excluded_at), raw, 0.0)
                row_pairs -= ((row + excluded_at >= 0) & (row + excluded_at < cols_left)).to(tl.float32)
                col_pairs -= ((col - excluded_at >= 0) & (col - excluded_at < rows_left)).to(tl.float32)
            row_raw = tl.sum(summed, axis=1)
            if WITH_COLS:
                tl.store(col_at + 4 * n, tl.sum(summed, axis=0), mask=col_ok)
        if is_edge | has_excluded:
            raw = tl.where(_kept(row, col, rows_left, cols_left, excluded_at), raw, float("-inf"))
    if STATS == 6 and WITH_COLS:
        tl.store(col_at + 5 * n, col_pairs, mask=col_ok)

    row_positive = tl.zeros((BLOCK_M,), tl.float32)
    row_positives = tl.zeros((BLOCK_M,), tl.float32)
    if POSITIVE_IDS:
        row_positives = tl.sum(is_positive.to(tl.float32), axis=1)
        if WITH_COLS:
            tl.store(col_at + 3 * n, tl.sum(is_positive.to(tl.float32), axis=0), mask=col_ok)
        positives = tl.where(is_positive, summed, 0.0)
        row_positive = tl.sum(positives, axis=1)
        if WITH_COLS:
            tl.store(col_at + 2 * n, tl.sum(positives, axis=0), mask=col_ok)
    else:
        col_positive = tl.zeros((BLOCK_N,), tl.float32)
        col_positives = tl.zeros((BLOCK_N,), tl.float32)
        if has_positive:
            within = (row < rows_left)[:, None] & (col < cols_left)[None, :]  # the others are -inf
            positives = tl.where(within & (col[None, :] == (row + positive_at)[:, None]), raw, 0.0)
            row_positive = tl.sum(positives, axis=1)
            row_positives = ((row + positive_at >= 0) & (row + positive_at < cols_left)).to(tl.float32)
            if WITH_COLS:
                col_positive = tl.sum(positives, axis=0)
                col_positives = ((col - positive_at >= 0) & (col - positive_at < rows_left)).to(tl.float32)
        if WITH_COLS:
            tl.store(col_at + 2 * n, col_positive, mask=col_ok)
            tl.store(col_at + 3 * n, col_positives, mask=col_ok)

    if WITH_COLS:
        maximum = tl.max(tl.max(raw, axis=1), axis=0)
        e = tl.exp2((raw - finite_from_below(maximum)) * scale)
        row_max = tl.zeros((BLOCK_M,), tl.float32) + maximum
        col_max = tl.zeros((BLOCK_N,), tl.float32) + maximum
        row_sum = tl.sum(e, axis=1)
        col_sum = tl.sum(e, axis=0)
        least_row = tl.min(tl.where(row < rows_left, row_sum, 1.0), axis=0)
        least_col = tl.min(tl.where(col_ok, col_sum, 1.0), axis=0)
        if tl.minimum(least_row, least_col) < _LEAST_SUM:
            row_max, row_sum = _sum_exp2(raw, scale, 1)
            col_max, col_sum = _sum_exp2(raw, scale, 0)
        tl.store(col_at, col_max, mask=col_ok)
        tl.store(col_at + n, col_sum, mask=col_ok)
    else:
        row_max, row_sum = _sum_exp2(raw, scale, 1)
    return row_max, row_sum, row_positive, row_positives, row_raw, row_pairs


# The sizes and diagonals change from panel to panel and batch to batch, and with them where the slices of ids and
# vectors begin: specialising on those would recompile in the middle of training. Strides and D are fixed by the model.
@triton.jit(do_not_specialize=["m", "n", "positive", "excluded"], do_not_specialize_on_alignment=["X_IDS", "Y_IDS"])
def _softmax_stats_kernel(
    X,  # [m, D]; this and Y perhaps as descriptors, see operands
    Y,  # [n, D]
    ROW_PARTIALS,  # [cdiv(n, BLOCK_N), STATS, m] fp32
    COL_PARTIALS,  # [cdiv(m, BLOCK_M), STATS, n] fp32, or None without WITH_COLS
    SCALE,
    X_IDS,  # [m] int64, or None without HAS_IDS
    Y_IDS,  # [n]
    m: tl.int64,
    n: tl.int64,
    D,
    positive: tl.int64,
    excluded: tl.int64,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    WITH_COLS: tl.constexpr,
    STATS: tl.constexpr,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):
    block_m, block_n = locate_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = block_m.to(tl.int64) * BLOCK_M
    first_col = block_n.to(tl.int64) * BLOCK_N
    raw = similarities(
        X, Y, m, n, D, first_row, first_col, stride_xm, stride_xd, stride_yn, stride_yd,
        EVEN_D, DESCRIPTORS, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    scale = _load_scale(SCALE) * _LOG2_E
    if HALVES:  # the left columns and then the right: half as much of the epilogue is in registers at a time
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = split_columns(raw, BLOCK_M, BLOCK_N)
        max_l, sum_l, positive_l, positives_l, raw_l, pairs_l = _stats_epilogue(
            left, COL_PARTIALS, X_IDS, Y_IDS, scale, m, n, positive, excluded, block_m, first_row, first_col,
            HAS_IDS, IGNORE_SAME_ID, WITH_COLS, STATS, BLOCK_M, WIDTH,
        )  # fmt: skip
        max_r, sum_r, positive_r, positives_r, raw_r, pairs_r = _stats_epilogue(
            right, COL_PARTIALS, X_IDS, Y_IDS, scale, m, n, positive, excluded, block_m, first_row, first_col + WIDTH,
            HAS_IDS, IGNORE_SAME_ID, WITH_COLS, STATS, BLOCK_M, WIDTH,
        )  # fmt: skip
        row_max = tl.maximum(max_l, max_r)
        shift = finite_from_below(row_max)
        row_sum = sum_l * tl.exp2((max_l - shift) * scale) + sum_r * tl.exp2((max_r - shift) * scale)
        row_positive = positive_l + positive_r
        row_positives = positives_l + positives_r
        row_raw = raw_l + raw_r
        row_pairs = pairs_l + pairs_r
    else:
        row_max, row_sum, row_positive, row_positives, row_raw, row_pairs = _stats_epilogue(
            raw, COL_PARTIALS, X_IDS, Y_IDS, scale, m, n, positive, excluded, block_m, first_row, first_col,
            HAS_IDS, IGNORE_SAME_ID, WITH_COLS, STATS, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    at = ROW_PARTIALS + block_n.to(tl.int64) * STATS * m + first_row + tl.arange(0, BLOCK_M)
    row_ok = first_row + tl.arange(0, BLOCK_M) < m
    tl.store(at, row_max, mask=row_ok)
    tl.store(at + m, row_sum, mask=row_ok)
    tl.store(at + 2 * m, row_positive, mask=row_ok)
    tl.store(at + 3 * m, row_positives, mask=row_ok)
    if STATS == 6:
        tl.store(at + 4 * m, row_raw, mask=row_ok)
        tl.store(at + 5 * m, row_pairs, mask=row_ok)


@triton.jit(do_not_specialize=["size", "blocks"], do_not_specialize_on_alignment=["STATISTICS"])
def _merge_stats_kernel(
    PARTIALS,  # [blocks, STATS, size] fp32
    STATISTICS,  # [size, STATS] float64
    SCALE,
    size: tl.int64,
    blocks,
    stride_m,
    stride_k,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Merge the statistics of the blocks, BLOCKS at a time, and then with the running ones."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < size
    natural_scale = _load_scale(SCALE)
    scale = natural_scale * _LOG2_E
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = PARTIALS + block.to(tl.int64)[:, None] * STATS * size + rows[None, :]
        ok = (block < blocks)[:, None] & row_ok[None, :]
        maxima = tl.load(at, mask=ok, other=float("-inf"))
        sums = tl.load(at + size, mask=ok, other=0.0)
        larger = tl.maximum(maximum, tl.max(maxima, axis=0))
        shift = finite_from_below(larger)
        total *= tl.exp2((maximum - shift) * scale)
        total += tl.sum((sums * tl.exp2((maxima - shift[None, :]) * scale)).to(tl.float64), axis=0)
        maximum = larger

    at = STATISTICS + rows * stride_m
    running = tl.load(at, mask=row_ok, other=0.0)
    maximum = maximum.to(tl.float64)
    larger = tl.maximum(running, maximum)
    shift = finite_from_below(larger)
    total *= tl.exp((maximum - shift) * natural_scale)
    total += tl.load(at + stride_k, mask=row_ok, other=0.0) * tl.exp((running - shift) * natural_scale)
    tl.store(at, larger, mask=row_ok)
    tl.store(at + stride_k, total, mask=row_ok)
    for k in tl.static_range(2, STATS):
        total = tl.load(at + k * stride_k, mask=row_ok, other=0.0)
        for first in range(0, blocks, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            from_blocks = PARTIALS + (block.to(tl.int64)[:, None] * STATS + k) * size + rows[None, :]
            ok = (block < blocks)[:, None] & row_ok[None, :]
            total += tl.sum(tl.load(from_blocks, mask=ok, other=0.0).to(tl.float64), axis=0)
        tl.store(at + k * stride_k, total, mask=row_ok)


def softmax_stats(
    x: Tensor,
    y: Tensor,
    row_stats: Tensor,
    col_stats: Tensor | None,
    scale: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    positive: int,
    excluded: int,
    *,
    config: Config | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Merge one panel into the running statistics of its rows and columns.

    Columns of the statistics: a maximum of x_i . y_j over kept pairs (of all that this row's or column's tiles hold, so
    at least its own; -inf before the first), the sum of exp(scale (x_i . y_j - maximum)), the sum of x_i . y_j over
    positive pairs, and their number; of six, also the sum of x_i . y_j over kept pairs, and their number.

    Args:
        x: rows [m, D] in fp32, bf16 or fp16, any strides; m and D at least 1.
        y: columns [n, D], of the same dtype, any strides; n at least 1.
        row_stats: [m, 4] or [m, 6] float64, any strides.
        col_stats: [n, 4] or [n, 6] alike, or None where only rows matter.
        scale: 0-dim fp32 on the device, at least 0.
        x_ids: [m] int64, contiguous, or None.
        y_ids: [n] likewise, given together with ``x_ids``.
        ignore_same_id: leave pairs of equal ids out, unless they are on the positive diagonal, instead of making them
            positives.
        positive: (i, j) is positive where j = i + positive; out of range, nowhere.
        excluded: (i, j) is left out where j = i + excluded, whatever else holds; out of range, nowhere.
        config: an entry of CONFIGS, by default the one that ``choose_config`` names.
        scratch: of the pass, which :func:`merging` made; it merges the rows' statistics later.
    """
    m, n, width, has_ids = x.shape[0], y.shape[0], x.shape[1], x_ids is not None
    stats = row_stats.shape[1]

    own = scratch or merging(n, 0, scale)

    def plan(config: Config) -> tuple[Config, dict[str, Any]]:
        fitted = suited(config_for(config, device_traits(x.device)[0], has_ids, stats == 6), x, y)
        with_cols = col_stats is not None
        return fitted, kernel_constants(fitted, product_kind(x), width, has_ids, ignore_same_id, with_cols, stats)

    def launch(config: Config, constants: dict[str, Any], row_partials: Tensor, col_partials: Tensor | None) -> None:
        """Statistics of the rows by column block, and of the columns by row block."""
        with on_device(x.device):
            _softmax_stats_kernel[(cdiv(m, config.block_m) * cdiv(n, config.block_n),)](
                *operands(config, x, y, None, own.descriptors)[:2],
                row_partials,
                col_partials,
                scale,
                x_ids,
                y_ids,
                m,
                n,
                width,
                nearest_diagonal(positive, m, n),
                nearest_diagonal(excluded, m, n),
                *x.stride(),
                *y.stride(),
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )

    def attempt(config: Config) -> None:
        fitted, constants = plan(config)
        blocks_m, blocks_n = cdiv(m, fitted.block_m), cdiv(n, fitted.block_n)
        new = functools.partial(x.new_empty, dtype=torch.float32)
        launch(fitted, constants, new(blocks_n, stats, m), new(blocks_m, stats, n) if col_stats is not None else None)

    fitted, constants = own.once(
        (m, n, col_stats is None),
        lambda: plan(config or choose_config("softmax_stats", x, y, None, attempt, has_ids=has_ids)),
    )
    col_partials = None if col_stats is None else own.column_partials(col_stats, cdiv(m, fitted.block_m))
    launch(fitted, constants, own.partials(row_stats, cdiv(n, fitted.block_n), n), col_partials)
    if scratch is None:
        own.reduce()
    if col_partials is not None and col_stats is not None:
        merge_statistics(col_partials, col_stats, scale)


def merging(columns: int, workspace: int, scale: Tensor) -> Scratch:
    """For a pass over so many columns."""
    return Scratch(columns, workspace, functools.partial(merge_statistics, scale=scale))


def merge_statistics(partials: Tensor, running: Tensor, scale: Tensor) -> None:
    """Of blocks, [blocks, 4 or 6, size], into running statistics [size, 4 or 6], in a fixed order."""
    blocks, stats, size = partials.shape
    with on_device(partials.device):
        _merge_stats_kernel[(cdiv(size, _MERGE_ROWS),)](
            partials, running, scale, size, blocks, *running.stride(),
            STATS=stats, BLOCK=_MERGE_ROWS, BLOCKS=_MERGE_BLOCKS, num_warps=4,
        )  # fmt: skip


def kernel_constants(
    config: Config, kind: str, width: int, has_ids: bool, ignore_same_id: bool, with_cols: bool, stats: int
) -> dict[str, Any]:
    """The compile-time arguments of the kernel. What is not wanted is not compiled in."""
    return {**pair_constants(config, kind, width, has_ids, ignore_same_id), "WITH_COLS": with_cols, "STATS": stats}
