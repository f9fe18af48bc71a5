"""What the kernels that visit the similarity matrix tile by tile have in common.

A panel is x [m, D] against y [n, D]. Each program forms one tile x_i . y_j in an fp32 accumulator and hands it to the
epilogue of its loss; how the matrix is cut depends on the chip and on the kind of product alone, so one table of
configurations serves all of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

import contextlib
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssl_kernels.kernels.configs import Config, is_aligned


@triton.jit
def locate_tile(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of a program. Programs walk down GROUP_M row blocks before they move to the next column
    block, so that those in flight share rows of x and of y in L2."""
    blocks_m = tl.cdiv(m, BLOCK_M).to(tl.int32)
    blocks_n = tl.cdiv(n, BLOCK_N).to(tl.int32)
    group = program // (GROUP_M * blocks_n)
    within = program % (GROUP_M * blocks_n)
    group_size = min(blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % group_size, within // group_size


@triton.jit
def similarities(
    X,  # [m, D], or a descriptor of it in blocks [BLOCK_M, BLOCK_D]
    Y,  # [n, D], likewise in blocks [BLOCK_N, BLOCK_D]
    m,
    n,
    D,
    first_row,
    first_col,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    EVEN_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    START=None,  # [BLOCK_M, BLOCK_N] fp32, which the products are added to
):
    """x_i . y_j of a tile, [BLOCK_M, BLOCK_N] fp32; zero beyond the panel, unless infinity meets the padding there.

    By pointers each step of the product costs a thread addresses, masks and copies: 22 instructions per element of a
    tile of 128 x 128 at D = 768 on sm_90, more than all of the sigmoid loss. By descriptors it costs 5, of a tile of
    256 x 128, and zeros beyond the panel are filled in.
    """
    raw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) if START is None else START
    if DESCRIPTORS:
        tl.assume(D > 0)  # or zeros would be made twice
        for d in range(0, D, BLOCK_D):
            x = X.load([first_row.to(tl.int32), d])
            y = Y.load([first_col.to(tl.int32), d])
            raw = tl.dot(x, tl.trans(y), raw, input_precision=INPUT_PRECISION)
    else:
        rows = first_row + tl.arange(0, BLOCK_M)
        cols = first_col + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_D)
        row_ok = rows < m
        col_ok = cols < n
        x_at = X + rows[:, None] * stride_xm + depth[None, :].to(tl.int64) * stride_xd
        y_at = Y + cols[None, :] * stride_yn + depth[:, None].to(tl.int64) * stride_yd
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(x_at, mask=row_ok[:, None], other=0.0)
                y = tl.load(y_at, mask=col_ok[None, :], other=0.0)
            else:
                x = tl.load(x_at, mask=row_ok[:, None] & (depth < D - d)[None, :], other=0.0)
                y = tl.load(y_at, mask=col_ok[None, :] & (depth < D - d)[:, None], other=0.0)
            raw = tl.dot(x, y, raw, input_precision=INPUT_PRECISION)
            x_at += BLOCK_D * tl.cast(stride_xd, tl.int64)
            y_at += BLOCK_D * tl.cast(stride_yd, tl.int64)
    return raw


@triton.jit
def split_columns(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def left_in_block(size, first, BLOCK: tl.constexpr):
    """How many of a block's rows or columns are within the panel."""
    return tl.maximum(tl.minimum(size - first, BLOCK), 0).to(tl.int32)


@triton.jit
def diagonal_in_block(diagonal, first_row, first_col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column, counted within the block, where a diagonal crosses its first row; clamped to where it no longer meets."""
    return tl.minimum(tl.maximum(diagonal + first_row - first_col, -BLOCK_M), BLOCK_N).to(tl.int32)


@triton.jit
def have_same_id(X_IDS, Y_IDS, first_row, first_col, row, col, row_ok, cols_left):
    """Which pairs of a block have one id."""
    x_id = tl.load(X_IDS + first_row + row, mask=row_ok, other=0)
    y_id = tl.load(Y_IDS + first_col + col, mask=col < cols_left, other=0)
    return x_id[:, None] == y_id[None, :]


@triton.jit
def finite_from_below(maximum):
    """A maximum to subtract: nothing is left of exp(-inf - 0), where exp(-inf + inf) would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def store_gradient(
    GRAD,  # [m, n], or a descriptor of it in blocks [BLOCK_M, BLOCK_N]
    g,  # [BLOCK_M, BLOCK_N] fp32
    first_row,
    first_col,
    row_ok,  # [BLOCK_M]: rows within the panel
    cols_left,
    is_edge,  # whether these are less than BLOCK_N
    stride_gm,
    DESCRIPTORS: tl.constexpr,
    FP16_GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write G of a block in the dtype of GRAD, in fp16 times a power of two."""
    dtype: tl.constexpr = GRAD.dtype if DESCRIPTORS else GRAD.dtype.element_ty
    g = (g * (FP16_GRADIENT_SCALE if dtype == tl.float16 else 1.0)).to(dtype)
    if DESCRIPTORS:
        GRAD.store([first_row.to(tl.int32), first_col.to(tl.int32)], g)
    else:
        row = tl.arange(0, BLOCK_M)
        col = tl.arange(0, BLOCK_N)
        grad_at = GRAD + first_col + (first_row + row)[:, None] * stride_gm + col[None, :]
        if is_edge:
            tl.store(grad_at, g, mask=row_ok[:, None] & (col < cols_left)[None, :])
        else:  # a mask that is constant along the row leaves the stores wide
            tl.store(grad_at, g, mask=row_ok[:, None])


def gradient_scale(dtype: torch.dtype, in_fp16: tl.constexpr) -> float:
    """The power of two that G carries in the gradient tile; whoever multiplies with the tile takes it out in fp32."""
    return float(in_fp16.value) if dtype == torch.float16 else 1.0


def cdiv(size: int, block: int) -> int:
    """How many blocks cover it. Triton's own takes the host five microseconds."""
    return -(-size // block)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels launched inside go to ``device``, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def gradient_tile(like: Tensor, columns: int) -> Tensor:
    """Memory for G of a panel: for each row of ``like`` [m, D] so many columns, in the same dtype.

    Rows are aligned, for wide stores. Through a descriptor a row is stored in whole pieces of 16 bytes, of which the
    last may write behind the last column: there is padding.
    """
    padded = like.new_empty(like.shape[0], cdiv(columns, 16) * 16)
    assert padded.shape[1] * padded.itemsize % 16 == 0
    return padded[:, :columns]


def suited(config: Config, x: Tensor, y: Tensor, grad: Tensor | None = None) -> Config:
    """The configuration, without descriptors where one of the three has rows that are not aligned."""
    if config.descriptors and not all(t is None or is_aligned(t) for t in (x, y, grad)):
        return replace(config, descriptors=False)
    return config


def operands(
    config: Config, x: Tensor, y: Tensor, grad: Tensor | None, known: dict[Hashable, Any] | None = None
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, Tensor | TensorDescriptor | None]:
    """The three as a kernel takes them: as descriptors of their blocks, or as they are. ``config`` is suited to them.

    Rows of ``grad`` have the padding that :func:`gradient_tile` gives them. Descriptors are kept in ``known``, with the
    tensors that they are of.
    """
    if not config.descriptors:
        return x, y, grad
    width = config.block_n // 2 if config.halves else config.block_n
    return (
        _descriptor(x, config.block_m, config.block_d, known),
        _descriptor(y, config.block_n, config.block_d, known),
        None if grad is None else _descriptor(grad, config.block_m, width, known),
    )


def _descriptor(t: Tensor, rows: int, columns: int, known: dict[Hashable, Any] | None) -> TensorDescriptor:
    key = id(t), rows, columns
    found = None if known is None else known.get(key)
    if found is None:
        found = TensorDescriptor.from_tensor(t, [rows, columns])
        if known is not None:
            known[key] = found
    return found


def nearest_diagonal(diagonal: int, m: int, n: int) -> int:
    """The diagonal, or the nearest that no longer meets the panel."""
    return max(min(diagonal, n), -m)


def tile_constants(config: Config, kind: str, width: int) -> dict[str, Any]:
    """The compile-time arguments of :func:`locate_tile` and :func:`similarities`."""
    return {
        "EVEN_D": width % config.block_d == 0,
        "DESCRIPTORS": config.descriptors,
        "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "GROUP_M": config.group_m,
    }


def pair_constants(config: Config, kind: str, width: int, has_ids: bool, ignore_same_id: bool) -> dict[str, Any]:
    """These, and the ones of an epilogue that compares ids and may take a tile half by half."""
    return {
        **tile_constants(config, kind, width),
        "HALVES": config.halves,
        "HAS_IDS": has_ids,
        "IGNORE_SAME_ID": has_ids and ignore_same_id,
    }
