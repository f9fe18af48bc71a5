r"""Triton kernels of teacher assignments: softmax statistics of rows and of columns of logits over prototypes.

For logits T [N, K], a temperature tau and a centre c [K],

    z_ik = (T_ik - c_k) / tau        p_ik = exp(z_ik - lse_i),  lse_i = log sum_k exp(z_ik)

The alternating normalisation of Sinkhorn-Knopp leaves p_ik = exp(T_ik / tau - u_i - v_k) after every step, so only the
potentials u and v are kept and the matrix is never written. A step over columns needs sum_i p_ik for c = tau v; the
first one, where rows have not been normalised and sums may be beyond fp32, a maximum and a sum of each column:

    m_k = max_i T_ik        s_k = sum_i exp((T_ik - m_k) / tau)

One exponential per element and visit, in base 2. Statistics of a row are taken over blocks of its columns, each against
its own maximum, and statistics of a column over a share of the rows, online against a running maximum; partial results
go to buffers with one slot per block, which a second, small launch merges in a fixed order, without atomics. The result
is bitwise reproducible on the same chip. A maximum is subtracted in the units of the logits, where the difference of
two values of 16 bits is all but exact, and multiplied then: a product less a rounded product, as one fma, would leave
the rounding, which exceeds 1 where logits are large.

Budget, in reads of the logits: one for row statistics, one for the statistics of columns, two for column sums, of which
the first is for the rows, two and a write for the probabilities. A program keeps its part of the centre in registers
over many rows. Compiled for sm_90 and followed through the code, not timed: 10 instructions per element for the
statistics of rows of 16 bits, 9 for those of columns, 8 for the probabilities.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.configs import HAS_OLD_TRITON, device_traits
from ssl_kernels.kernels.tiles import cdiv, finite_from_below, on_device

__all__ = ["centered_softmax", "column_lse", "column_sums", "row_stats"]

_LOG2_E = tl.constexpr(1.4426950408889634)
# Columns of a row at a time: 32 per thread, so that reductions are a small part of the work; and where rows are not
# aligned, so that each element takes an address of its own, as many as registers allow.
_BLOCK_K = 4096
_BLOCK_K_UNALIGNED = 1024
_BLOCK_ROWS = 8  # rows of a tile of columns, all of which one thread holds
_WARPS = 4
_ROW_PROGRAMS_PER_MULTIPROCESSOR = 32
_COLUMN_PROGRAMS_PER_MULTIPROCESSOR = 8
_MERGE_ROWS = 32
_MERGE_SPLITS = 16
_MERGE_COLUMNS = 256


@triton.jit
def columns_of_block(block, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns of a block, and which of them there are: all, known when compiled, if blocks divide the row."""
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    return k, tl.full((BLOCK_K,), True, tl.int1) if EVEN_K else k < K


@triton.jit
def load_center(CENTER, k, k_ok, HAS_CENTER: tl.constexpr):
    """Part of the centre, or a zero."""
    return tl.load(CENTER + k, mask=k_ok, other=0.0) if HAS_CENTER else 0.0


@triton.jit
def merge_maxima_and_sums(MAXIMA, SUMS, scale, at, row_ok, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Maxima and sums of rows from those of their blocks, ``splits`` of them from ``at`` [ROWS] on; 0 and 1 beyond."""
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        ok = row_ok[:, None] & (split < splits)[None, :]
        maxima = tl.load(MAXIMA + at[:, None] + split[None, :], mask=ok, other=float("-inf"))
        maximum = tl.maximum(maximum, tl.max(maxima, axis=1))
    shift = finite_from_below(maximum)
    total = tl.where(row_ok, 0.0, 1.0)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        ok = row_ok[:, None] & (split < splits)[None, :]
        maxima = tl.load(MAXIMA + at[:, None] + split[None, :], mask=ok, other=float("-inf"))
        sums = tl.load(SUMS + at[:, None] + split[None, :], mask=ok, other=0.0)
        total += tl.sum(sums * tl.exp2((maxima - shift[:, None]) * scale), axis=1)
    return shift, total


# Batches differ in size, and so does where a block's share of the partial results begins: specialising on either would
# recompile. K and strides are fixed by the model.
@triton.jit(do_not_specialize=["crops", "B", "span"], do_not_specialize_on_alignment=["MAXIMA", "SUMS"])
def _row_stats_kernel(
    X,  # [crops, B, K]
    CENTER,  # [K] fp32, or None without HAS_CENTER
    TEMPERATURE,
    MAXIMA,  # [crops, B, cdiv(K, BLOCK_K)] fp32, of x less the centre
    SUMS,
    crops: tl.int32,
    B: tl.int64,
    span: tl.int64,  # of B, those of one program
    K,
    stride_xn,
    stride_xb,
    stride_xk,
    HAS_CENTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks).to(tl.int64) * span
    k, k_ok = columns_of_block(block, K, EVEN_K, BLOCK_K)
    scale = _LOG2_E / tl.load(TEMPERATURE)
    center = load_center(CENTER, k, k_ok, HAS_CENTER)
    for step in range(tl.minimum(B - first, span).to(tl.int32)):
        b = first + step
        for i in range(crops):
            crop = tl.cast(i, tl.int64)
            at = X + crop * stride_xn + b * stride_xb
            x = tl.load(at + k.to(tl.int64) * stride_xk, mask=k_ok, other=float("-inf")).to(tl.float32)
            x -= center
            maximum = tl.max(x, axis=0)
            to = (crop * B + b) * blocks + block
            tl.store(MAXIMA + to, maximum)
            tl.store(SUMS + to, tl.sum(tl.exp2((x - finite_from_below(maximum)) * scale), axis=0))


@triton.jit(do_not_specialize=["rows"])
def _merge_rows_kernel(
    MAXIMA,  # [rows, splits]
    SUMS,
    TEMPERATURE,
    SHIFTS,  # [rows] fp32
    RECIPROCALS,  # [rows] fp32
    rows: tl.int64,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    scale = _LOG2_E / tl.load(TEMPERATURE)
    shift, total = merge_maxima_and_sums(MAXIMA, SUMS, scale, row * splits, row_ok, splits, ROWS, SPLITS)
    tl.store(SHIFTS + row, shift, mask=row_ok)
    tl.store(RECIPROCALS + row, 1.0 / total, mask=row_ok)


@triton.jit(do_not_specialize=["N", "span"])
def _column_lse_kernel(
    X,  # [N, K]
    TEMPERATURE,
    MAXIMA,  # [splits, K] fp32, in the units of x
    SUMS,
    N: tl.int64,
    span: tl.int64,  # rows of one split, a multiple of BLOCK_N
    K,
    stride_xn,
    stride_xk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    split = tl.program_id(1).to(tl.int64)
    rows_left = tl.minimum(N - split * span, span)
    scale = _LOG2_E / tl.load(TEMPERATURE)
    at = X + split * span * stride_xn + k.to(tl.int64) * stride_xk
    maximum = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, rows_left, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N).to(tl.int64)
        ok = (row < rows_left)[:, None] & k_ok[None, :]
        x = tl.load(at[None, :] + row[:, None] * stride_xn, mask=ok, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, axis=0))
        shift = finite_from_below(larger)
        total = total * tl.exp2((maximum - shift) * scale) + tl.sum(tl.exp2((x - shift[None, :]) * scale), axis=0)
        maximum = larger
    tl.store(MAXIMA + split * K + k, maximum, mask=k_ok)
    tl.store(SUMS + split * K + k, total, mask=k_ok)


@triton.jit(do_not_specialize=["splits"])
def _merge_columns_kernel(
    MAXIMA,  # [splits, K]
    SUMS,
    TEMPERATURE,
    MAXIMUM,  # [K] fp32, in the units of x
    SUM,
    K,
    splits,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    scale = _LOG2_E / tl.load(TEMPERATURE)
    maximum = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * K + k
        part = tl.load(MAXIMA + at, mask=k_ok, other=0.0)
        larger = tl.maximum(maximum, part)
        shift = finite_from_below(larger)
        total *= tl.exp2((maximum - shift) * scale)
        total += tl.exp2((part - shift) * scale) * tl.load(SUMS + at, mask=k_ok, other=0.0)
        maximum = larger
    tl.store(MAXIMUM + k, maximum, mask=k_ok)
    tl.store(SUM + k, total, mask=k_ok)


@triton.jit(do_not_specialize=["N", "span"])
def _column_sums_kernel(
    X,  # [N, K]
    CENTER,  # [K] fp32
    TEMPERATURE,
    SHIFTS,  # [N] fp32
    RECIPROCALS,  # [N]
    PARTIALS,  # [splits, K] fp32
    N: tl.int64,
    span: tl.int64,  # rows of one split, a multiple of BLOCK_N
    K,
    stride_xn,
    stride_xk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    split = tl.program_id(1).to(tl.int64)
    first_row = split * span
    rows_left = tl.minimum(N - first_row, span)
    scale = _LOG2_E / tl.load(TEMPERATURE)
    center = tl.load(CENTER + k, mask=k_ok, other=0.0)
    at = X + first_row * stride_xn + k.to(tl.int64) * stride_xk
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, rows_left, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N).to(tl.int64)
        row_ok = row < rows_left
        shift = tl.load(SHIFTS + first_row + row, mask=row_ok, other=0.0)
        reciprocal = tl.load(RECIPROCALS + first_row + row, mask=row_ok, other=0.0)
        ok = row_ok[:, None] & k_ok[None, :]
        x = tl.load(at[None, :] + row[:, None] * stride_xn, mask=ok, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp2((x - center[None, :] - shift[:, None]) * scale) * reciprocal[:, None], axis=0)
    tl.store(PARTIALS + split * K + k, total, mask=k_ok)


@triton.jit(do_not_specialize=["N", "span"])
def _centered_softmax_kernel(
    X,  # [N, K]
    CENTER,  # [K] fp32, or None without HAS_CENTER
    TEMPERATURE,
    SHIFTS,  # [N] fp32
    RECIPROCALS,  # [N]
    OUT,  # [N, K] fp32
    N: tl.int64,
    span: tl.int64,  # rows of one program
    K,
    stride_xn,
    stride_xk,
    HAS_CENTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    k, k_ok = columns_of_block(tl.program_id(0) % blocks, K, EVEN_K, BLOCK_K)
    first = (tl.program_id(0) // blocks).to(tl.int64) * span
    scale = _LOG2_E / tl.load(TEMPERATURE)
    center = load_center(CENTER, k, k_ok, HAS_CENTER)
    for step in range(tl.minimum(N - first, span).to(tl.int32)):
        row = first + step
        x = tl.load(X + row * stride_xn + k.to(tl.int64) * stride_xk, mask=k_ok, other=float("-inf")).to(tl.float32)
        z = (x - center - tl.load(SHIFTS + row)) * scale
        tl.store(OUT + row * K + k, tl.exp2(z) * tl.load(RECIPROCALS + row), mask=k_ok)


def are_aligned(matrices: Iterable[Tensor], strides: Sequence[int]) -> bool:
    """Whether each row starts at a multiple of 16 bytes and elements and is contiguous."""
    *outer, column = strides
    return column == 1 and all(s % 16 == 0 for s in outer) and all(x.data_ptr() % 16 == 0 for x in matrices)


def block_of_row(width: int, aligned: bool) -> int:
    """How many columns of a row a program takes. Half as many with an older Triton if the last ones are masked."""
    most = _BLOCK_K if aligned else _BLOCK_K_UNALIGNED
    if HAS_OLD_TRITON and aligned and width % most:
        most //= 2
    return min(triton.next_power_of_2(width), most)


def rows_per_program(rows: int, blocks: int, device: torch.device) -> int:
    """Of rows that are cut into so many blocks each, those that a program visits one after the other."""
    groups = _ROW_PROGRAMS_PER_MULTIPROCESSOR * device_traits(device)[2] // blocks
    return cdiv(rows, max(1, min(groups, rows)))


def row_stats(
    blocks: list[Tensor], temp: Tensor, center: Tensor | None, *, span: int | None = None
) -> tuple[Tensor, Tensor]:
    """Shift and reciprocal that make probabilities of rows: exp((T - center - shift) / temp) times reciprocal.

    Args:
        blocks: at least one, each [n, B, K] in fp32, bf16 or fp16, any strides; all of one B and one K, which is at
            least 1.
        temp: 0-dim fp32 on the device, positive.
        center: [K] fp32, contiguous, or None.
        span: rows of one program, by default so many that programs fill the chip.

    Returns:
        shift and reciprocal, fp32 [rows] over the rows of one block after the other.
    """
    device, width = blocks[0].device, blocks[0].shape[-1]
    rows = blocks[0].shape[1] * sum(block.shape[0] for block in blocks)
    shifts, reciprocals = torch.empty(2, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return shifts, reciprocals
    block_k = block_of_row(width, all(are_aligned([x], x.stride()) for x in blocks))
    splits = cdiv(width, block_k)
    maxima, sums = torch.empty(2, rows, splits, dtype=torch.float32, device=device)
    first = 0
    with on_device(device):
        for x in blocks:
            crops, batch, _ = x.shape
            each = span or rows_per_program(batch, splits, device)
            _row_stats_kernel[(splits * cdiv(batch, each),)](
                x, center, temp, maxima[first:], sums[first:], crops, batch, each, width, *x.stride(),
                HAS_CENTER=center is not None, EVEN_K=width % block_k == 0, BLOCK_K=block_k, num_warps=_WARPS,
            )  # fmt: skip
            first += crops * batch
        _merge_rows_kernel[(cdiv(rows, _MERGE_ROWS),)](
            maxima, sums, temp, shifts, reciprocals, rows, splits, ROWS=_MERGE_ROWS, SPLITS=_MERGE_SPLITS, num_warps=4
        )
    return shifts, reciprocals


def column_lse(rows: Tensor, temp: Tensor, *, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """Maxima m_k of T_ik over the rows, and sums of exp((T_ik - m_k) / temp).

    Args:
        rows: T, [N, K] in fp32, bf16 or fp16, any strides; K at least 1.
        temp: 0-dim fp32 on the device, positive.
        splits: into how many parts the rows are cut at most, by default as many as fill the chip.

    Returns:
        maxima and sums, fp32 [K]; -inf and 0 where there is no row.
    """
    (n, width), device = rows.shape, rows.device
    maximum = torch.full((width,), float("-inf"), dtype=torch.float32, device=device)
    total = torch.zeros(width, dtype=torch.float32, device=device)
    if n == 0:
        return maximum, total
    block_k, columns, splits, span = _cut_columns(rows, splits)
    maxima, sums = torch.empty(2, splits, width, dtype=torch.float32, device=device)
    with on_device(device):
        _column_lse_kernel[(columns, splits)](
            rows, temp, maxima, sums, n, span, width, *rows.stride(),
            BLOCK_N=_BLOCK_ROWS, BLOCK_K=block_k, num_warps=_WARPS,
        )  # fmt: skip
        _merge_columns_kernel[(cdiv(width, _MERGE_COLUMNS),)](
            maxima, sums, temp, maximum, total, width, splits, BLOCK_K=_MERGE_COLUMNS, num_warps=4
        )
    return maximum, total


def column_sums(rows: Tensor, temp: Tensor, center: Tensor, *, splits: int | None = None) -> Tensor:
    """Sums over the rows of softmax_k((T_ik - center_k) / temp).

    Args:
        rows, temp, splits: as for :func:`column_lse`.
        center: [K] fp32, contiguous.

    Returns:
        fp32 [K]; zeros where there is no row.
    """
    (n, width), device = rows.shape, rows.device
    if n == 0:
        return torch.zeros(width, dtype=torch.float32, device=device)
    shifts, reciprocals = row_stats([rows[None]], temp, center)
    block_k, columns, splits, span = _cut_columns(rows, splits)
    partials = torch.empty(splits, width, dtype=torch.float32, device=device)
    with on_device(device):
        _column_sums_kernel[(columns, splits)](
            rows, center, temp, shifts, reciprocals, partials, n, span, width, *rows.stride(),
            BLOCK_N=_BLOCK_ROWS, BLOCK_K=block_k, num_warps=_WARPS,
        )  # fmt: skip
    return partials.sum(dim=0)


def centered_softmax(rows: Tensor, temp: Tensor, center: Tensor | None, *, span: int | None = None) -> Tensor:
    """Softmax over k of (T_ik - center_k) / temp.

    Args:
        rows, temp: as for :func:`column_lse`.
        center: [K] fp32, contiguous, or None.
        span: rows of one program, by default so many that programs fill the chip.

    Returns:
        fp32 [N, K], contiguous.
    """
    (n, width), device = rows.shape, rows.device
    out = torch.empty(n, width, dtype=torch.float32, device=device)
    if n == 0:
        return out
    shifts, reciprocals = row_stats([rows[None]], temp, center, span=span)
    block_k = block_of_row(width, are_aligned([rows], rows.stride()))
    splits = cdiv(width, block_k)
    span = span or rows_per_program(n, splits, device)
    with on_device(device):
        _centered_softmax_kernel[(splits * cdiv(n, span),)](
            rows, center, temp, shifts, reciprocals, out, n, span, width, *rows.stride(),
            HAS_CENTER=center is not None, EVEN_K=width % block_k == 0, BLOCK_K=block_k, num_warps=_WARPS,
        )  # fmt: skip
    return out


def columns_of_tile(width: int, family: str, aligned: bool) -> int:
    """So many that the warps lie side by side, and a thread has whole columns of its tile to itself. Where rows are not
    aligned, each element takes an address, for which an older Triton has fewer registers."""
    most = 2048 if family == "gfx9" else 1024
    return min(triton.next_power_of_2(width), most // 4 if HAS_OLD_TRITON and not aligned else most)


def _cut_columns(rows: Tensor, splits: int | None) -> tuple[int, int, int, int]:
    """(columns of a tile, tiles side by side, splits of the rows, none of them empty, rows of a split)."""
    n, width = rows.shape
    family, _, multiprocessors = device_traits(rows.device)
    block_k = columns_of_tile(width, family, are_aligned([rows], rows.stride()))
    columns = cdiv(width, block_k)
    if splits is None:
        splits = _COLUMN_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // columns
    steps = cdiv(n, _BLOCK_ROWS)
    span = cdiv(steps, max(1, min(splits, steps))) * _BLOCK_ROWS
    return block_k, columns, cdiv(n, span), span
