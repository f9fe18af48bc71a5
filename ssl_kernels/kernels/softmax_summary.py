r"""Triton kernels of the softmax contrastive losses between and after the visits to the tiles: all that is O(M + N).

From the statistics of rows and columns, (max, S, P, n) of each and with label smoothing (..., R, k), one launch makes
the sums of the loss

    l = share (t gap + log S)    gap = (1 - s) (max - P / n) + s (max - R / k)    share 1 / sides, l = 0 where n = 0

of each block, how many of its rows have a positive pair, and the largest weight that it is given. A second launch adds
up the sums of the blocks, in every program alike, and writes what the visit for gradients needs of each row

    top = max, share = w / S, target = (1 - s) w / n, uniform = s w / k

for weights w in the loss, divided by their unit, the largest; all are 0 where w is. Sums are in float64, and no order
depends on that in which programs run: results are the same to the last bit.

A third is for the backward pass: one program makes the factor of the features' gradients, and the derivatives of scale
and bias.

Budget: 32 or 48 bytes read twice, and 12 or 16 written for each row and column; at B = 1,024 both launches take little
more than what a launch costs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.tiles import cdiv, on_device

__all__ = ["finish_scalars", "softmax_summary"]

_BLOCK = 256  # rows or columns
_BLOCKS = 64  # whose sums are added up at a time
_WARPS = 4


@triton.jit
def _place(rows, columns, row_blocks, BLOCK: tl.constexpr):
    """Of a program: whether its block is of rows, where it begins in its side, that side's place among all and size."""
    is_row = tl.program_id(0) < row_blocks
    block = tl.program_id(0) - tl.where(is_row, 0, row_blocks)
    return is_row, block.to(tl.int64) * BLOCK, tl.where(is_row, 0, rows), tl.where(is_row, rows, columns)


@triton.jit(do_not_specialize=["rows", "columns", "row_blocks", "smoothing"])
def _summary_sums_kernel(
    STATISTICS,  # [rows + columns, STATS] float64, contiguous
    ROW_WEIGHT,  # [rows], and of the columns alike; or None
    SCALE,
    SUMS,  # [blocks, 3] float64
    rows: tl.int64,
    columns: tl.int64,
    row_blocks: tl.int64,
    smoothing: tl.float64,
    SIDES: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, first, offset, size = _place(rows, columns, row_blocks, BLOCK)
    row = first + tl.arange(0, BLOCK)
    ok = row < size
    at = STATISTICS + (offset + row) * STATS
    top = tl.load(at, mask=ok, other=0.0)
    total = tl.load(at + 1, mask=ok, other=1.0)
    positives = tl.load(at + 3, mask=ok, other=0.0)
    paired = positives > 0
    gap = top - tl.load(at + 2, mask=ok, other=0.0) / tl.where(paired, positives, 1.0)
    if STATS == 6:
        pairs = tl.load(at + 5, mask=ok, other=1.0)
        smooth = top - tl.load(at + 4, mask=ok, other=0.0) / tl.where(paired, pairs, 1.0)
        gap = (1.0 - smoothing) * gap + smoothing * smooth
    scale = tl.load(SCALE).to(tl.float64)
    loss = (scale * gap + tl.log(tl.where(paired, total, 1.0))) / SIDES
    at = SUMS + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, tl.sum(tl.where(paired, loss, 0.0), axis=0))
    tl.store(at + 1, tl.sum(paired.to(tl.float64), axis=0))
    if ROW_WEIGHT is not None:
        weight = tl.abs(tl.load(ROW_WEIGHT + row, mask=ok, other=0.0).to(tl.float64)) / SIDES
        tl.store(at + 2, tl.max(weight, axis=0) + 0.0 * tl.sum(weight, axis=0))  # a maximum alone would lose NaN


@triton.jit(do_not_specialize=["rows", "columns", "row_blocks", "blocks", "smoothing"])
def _summary_vectors_kernel(
    STATISTICS,  # as above
    ROW_WEIGHT,
    SUMS,
    LOSS,
    UNPAIRED,  # int64
    SCALARS,  # [3]
    VECTORS,  # [3 or 4, rows + columns] fp32, or None where they are not wanted
    rows: tl.int64,
    columns: tl.int64,
    row_blocks: tl.int64,
    blocks: tl.int64,
    smoothing: tl.float64,
    MEAN: tl.constexpr,
    SIDES: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row_loss = tl.sum(tl.zeros((BLOCKS,), tl.float64), axis=0)
    col_loss = row_loss
    row_count = row_loss
    col_count = row_loss
    unit = row_loss
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        ok = block < blocks
        of_row = block < row_blocks
        loss = tl.load(SUMS + block * 3, mask=ok, other=0.0)
        count = tl.load(SUMS + block * 3 + 1, mask=ok, other=0.0)
        row_loss += tl.sum(tl.where(of_row, loss, 0.0), axis=0)
        col_loss += tl.sum(tl.where(of_row, 0.0, loss), axis=0)
        row_count += tl.sum(tl.where(of_row, count, 0.0), axis=0)
        col_count += tl.sum(tl.where(of_row, 0.0, count), axis=0)
        if ROW_WEIGHT is not None:
            largest = tl.load(SUMS + block * 3 + 2, mask=ok, other=0.0)
            unit = tl.maximum(unit, tl.max(largest, axis=0)) + 0.0 * (unit + tl.sum(largest, axis=0))
    row_divisor = tl.maximum(row_count, 1.0) if MEAN else 1.0 + 0.0 * row_count
    col_divisor = tl.maximum(col_count, 1.0) if MEAN else 1.0 + 0.0 * col_count
    if ROW_WEIGHT is None:
        unit = 1.0 / (SIDES * row_divisor)
        if SIDES == 2:
            unit = tl.maximum(unit, 1.0 / (SIDES * col_divisor))
    unit = tl.where(unit == 0.0, 1.0, unit)
    if tl.program_id(0) == 0:
        tl.store(LOSS, (row_loss / row_divisor + col_loss / col_divisor).to(tl.float32))
        tl.store(UNPAIRED, rows + columns - (row_count + col_count).to(tl.int64))
        tl.store(SCALARS, 0.0)
        tl.store(SCALARS + 1, 0.0)
        tl.store(SCALARS + 2, unit.to(tl.float32))

    if VECTORS is not None:
        is_row, first, offset, size = _place(rows, columns, row_blocks, BLOCK)
        row = first + tl.arange(0, BLOCK)
        ok = row < size
        at = STATISTICS + (offset + row) * STATS
        positives = tl.load(at + 3, mask=ok, other=0.0)
        if ROW_WEIGHT is not None:
            weight = tl.load(ROW_WEIGHT + row, mask=ok, other=0.0).to(tl.float64) / SIDES
        else:
            weight = 1.0 / (SIDES * tl.where(is_row, row_divisor, col_divisor)) + tl.zeros((BLOCK,), tl.float64)
        weight = tl.where(positives == 0, 0.0, weight / unit)
        counts = weight != 0.0  # so that no 0 meets an infinite exponential
        top = tl.where(counts, tl.load(at, mask=ok, other=0.0), 0.0)
        share = weight / tl.where(counts, tl.load(at + 1, mask=ok, other=1.0), 1.0)
        to = VECTORS + offset + row
        plane = rows + columns
        tl.store(to, top.to(tl.float32), mask=ok)
        tl.store(to + plane, share.to(tl.float32), mask=ok)
        target = (1.0 - smoothing) * weight / tl.maximum(positives, 1.0)
        tl.store(to + 2 * plane, target.to(tl.float32), mask=ok)
        if STATS == 6:
            uniform = smoothing * weight / tl.maximum(tl.load(at + 5, mask=ok, other=1.0), 1.0)
            tl.store(to + 3 * plane, uniform.to(tl.float32), mask=ok)


@triton.jit
def _finish_scalars_kernel(
    UPSTREAM,  # or None, which is 1
    SCALE,
    SCALARS,  # [3]: the derivatives by scale and by bias, and the unit
    FACTOR,
    BY_SCALE,
    BY_BIAS,
):
    shared = tl.load(SCALARS + 2)
    if UPSTREAM is not None:
        shared = shared * tl.load(UPSTREAM)
    tl.store(FACTOR, shared * tl.load(SCALE))
    tl.store(BY_SCALE, tl.load(SCALARS) * shared)
    tl.store(BY_BIAS, tl.load(SCALARS + 1) * shared)


def softmax_summary(
    statistics: Tensor,
    rows: int,
    sides: int,
    scale: Tensor,
    label_smoothing: float,
    mean: bool,
    row_weight: Tensor | None,
    loss: Tensor,
    unpaired: Tensor,
    scalars: Tensor,
    vectors: Tensor | None,
) -> None:
    """Write the loss, and what the gradients need of every row and column.

    Args:
        statistics: [M, 4], or [M, 6] with label smoothing, float64, contiguous, as
            :func:`ssl_kernels.kernels.softmax_stats.softmax_stats` makes them: of the rows, then of the columns.
        rows: how many of these are of rows.
        sides: 2, or 1 if the matrix is symmetric: then there are rows only, which are the columns, too.
        scale: 0-dim fp32.
        label_smoothing: from 0 to 1.
        mean: over the rows that have a positive pair, and over such columns; otherwise the sum.
        row_weight: [rows] contiguous, replaces what the reduction gives to a row and to the column paired with it.
        loss: 0-dim fp32, as all that follows receives a result.
        unpaired: 0-dim int64, the number of rows and columns without a positive pair.
        scalars: [3] fp32, 0 and 0, and the unit of the weights.
        vectors: [3, M], or [4, M] with label smoothing, fp32, contiguous: the last arguments of
            :func:`ssl_kernels.kernels.softmax_grad.softmax_grad`; or None.
    """
    size, stats = statistics.shape
    columns = size - rows
    row_blocks, col_blocks = cdiv(rows, _BLOCK), cdiv(columns, _BLOCK)
    blocks = max(row_blocks + col_blocks, 1)
    sums = statistics.new_empty(blocks, 3)
    with on_device(statistics.device):
        _summary_sums_kernel[(blocks,)](
            statistics, row_weight, scale, sums, rows, columns, row_blocks, label_smoothing,
            SIDES=sides, STATS=stats, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        _summary_vectors_kernel[(1 if vectors is None else blocks,)](
            statistics, row_weight, sums, loss, unpaired, scalars, vectors, rows, columns, row_blocks, blocks,
            label_smoothing, MEAN=mean, SIDES=sides, STATS=stats, BLOCK=_BLOCK, BLOCKS=_BLOCKS, num_warps=_WARPS,
        )  # fmt: skip


def finish_scalars(
    upstream: Tensor | None, scale: Tensor, scalars: Tensor, factor: Tensor, by_scale: Tensor, by_bias: Tensor
) -> None:
    """Write what the gradients of the features are to be multiplied by, and the derivatives by scale and by bias.

    Args:
        upstream: 0-dim fp32, or None, which is 1.
        scale: 0-dim fp32, as are ``factor``, ``by_scale`` and ``by_bias``.
        scalars: [3] fp32, contiguous: the derivatives by scale and by bias, and the unit of all.
    """
    with on_device(scalars.device):
        _finish_scalars_kernel[(1,)](upstream, scale, scalars, factor, by_scale, by_bias, num_warps=1)
