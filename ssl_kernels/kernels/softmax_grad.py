r"""Triton tile kernel of the softmax contrastive losses, second visit: the gradient tile (see softmax.py).

Weights are at most 1 in magnitude, so |G| <= 2 on a loss that is a mean of cross-entropies; G is written in the dtype
of the features (in fp16 times 2^14, see gradient_scale).

e = 2^(z - c) against the largest c of the tile's maxima, which no z exceeds; then

    G = e (a_i 2^(c - t mr_i) + b_j 2^(c - t mc_j))

whose factors are made once per row and column: fma, ex2, addition, multiplication. If a factor may be above 2^60, or
c beyond 2^10, where its rounding would be seen, the two exponentials are taken one by one, of differences with the
maxima; if not, what underflows is below 2^-66.

Budget per element: 18 instructions, 6 of them in the loop of the product. Written: one element of G, once, in the dtype
of the features; 4 / block_n bytes of row sums.
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

from ssl_kernels.kernels import tiles
from ssl_kernels.kernels.configs import Config, choose_config, device_traits, product_kind
from ssl_kernels.kernels.scratch import Scratch
from ssl_kernels.kernels.softmax import config_for
from ssl_kernels.kernels.tiles import (
    cdiv,
    diagonal_in_block,
    have_same_id,
    left_in_block,
    locate_tile,
    nearest_diagonal,
    on_device,
    operands,
    pair_constants,
    similarities,
    split_columns,
    store_gradient,
    suited,
)

__all__ = ["FP16_GRADIENT_SCALE", "gradient_scale", "kernel_constants", "softmax_grad"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST_EXPONENT = tl.constexpr(60.0)
_FARTHEST = tl.constexpr(2.0**10)
# A softmax over many negatives is mostly below the normal range of fp16; times 2^14, G still fits.
FP16_GRADIENT_SCALE = tl.constexpr(2.0**14)
gradient_scale = functools.partial(tiles.gradient_scale, in_fp16=FP16_GRADIENT_SCALE)


@triton.jit
def _load_side(TOP, SHARE, at, ok):
    """Maxima, and what exponentials against them are multiplied by; +inf and 0 for what takes no part, so that its
    exponentials are 0."""
    top = tl.load(TOP + at, mask=ok, other=0.0)
    share = tl.load(SHARE + at, mask=ok, other=0.0)
    return tl.where(share != 0.0, top, float("inf")), share


@triton.jit
def _exponent_of_factor(top, share, scale, highest):
    """At most 1 below its logarithm, and that of its exponential alone if the share is below 1. From the bits of the
    share: made of the factor itself, exponentials would be taken twice."""
    exponent = tl.maximum(((share.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127, 0)
    return tl.where(share != 0.0, exponent.to(tl.float32) + (highest - top * scale), float("-inf"))


@triton.jit
def _factors(top, share, scale, highest):
    """What 2^(z - highest) is multiplied by for the sake of a row or column."""
    return tl.where(share != 0.0, share * tl.exp2(highest - top * scale), 0.0)


@triton.jit
def _grad_epilogue(
    raw,  # [BLOCK_M, BLOCK_N] fp32
    GRAD,
    X_IDS,
    Y_IDS,
    ROW_TOP,
    COL_TOP,
    ROW_SHARE,
    COL_SHARE,
    ROW_TARGET,
    COL_TARGET,
    ROW_UNIFORM,
    COL_UNIFORM,
    scale,
    highest,  # the largest of the maxima, times scale
    is_narrow,  # whether the factors are of use
    row_factor,  # [BLOCK_M]
    col_factor,  # [BLOCK_N]
    m,
    n,
    positive,
    excluded,
    first_row,
    first_col,
    stride_gm,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write G of a block of similarities and return its row sums of G raw, [BLOCK_M]."""
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    rows_left = left_in_block(m, first_row, BLOCK_M)
    cols_left = left_in_block(n, first_col, BLOCK_N)
    row_ok = row < rows_left
    col_ok = col < cols_left
    positive_at = diagonal_in_block(positive, first_row, first_col, BLOCK_M, BLOCK_N)
    excluded_at = diagonal_in_block(excluded, first_row, first_col, BLOCK_M, BLOCK_N)
    is_edge = cols_left < BLOCK_N
    has_positive = (positive_at > -BLOCK_M) & (positive_at < cols_left)
    has_excluded = (excluded_at > -BLOCK_M) & (excluded_at < cols_left)

    if is_narrow:
        e = tl.exp2(raw * scale - tl.where(highest == float("-inf"), float("inf"), highest))
        g = e * (row_factor[:, None] + col_factor[None, :])
    else:
        top, share = _load_side(ROW_TOP, ROW_SHARE, first_row + row, row_ok)
        g = share[:, None] * tl.exp2((raw - top[:, None]) * scale)
        top, share = _load_side(COL_TOP, COL_SHARE, first_col + col, col_ok)
        g += share[None, :] * tl.exp2((raw - top[None, :]) * scale)
    if HAS_UNIFORM:
        row_uniform = tl.load(ROW_UNIFORM + first_row + row, mask=row_ok, other=0.0)
        col_uniform = tl.load(COL_UNIFORM + first_col + col, mask=col_ok, other=0.0)
        g -= row_uniform[:, None] + col_uniform[None, :]

    # Rows beyond the panel are not stored.
    if HAS_IDS:
        is_positive = col[None, :] == (row + positive_at)[:, None]
        same_id = have_same_id(X_IDS, Y_IDS, first_row, first_col, row, col, row_ok, cols_left)
        kept = col_ok[None, :] & (col[None, :] != (row + excluded_at)[:, None])
        if IGNORE_SAME_ID:
            kept = kept & (is_positive | (same_id == 0))
        else:
            is_positive = is_positive | same_id
        row_target = tl.load(ROW_TARGET + first_row + row, mask=row_ok, other=0.0)
        col_target = tl.load(COL_TARGET + first_col + col, mask=col_ok, other=0.0)
        g = tl.where(is_positive, g - (row_target[:, None] + col_target[None, :]), g)
        g = tl.where(kept, g, 0.0)
        raw = tl.where(kept, raw, 0.0)
    else:
        if has_positive:
            ok = row_ok & (row + positive_at >= 0) & (row + positive_at < cols_left)
            target = tl.load(ROW_TARGET + first_row + row, mask=ok, other=0.0)
            target += tl.load(COL_TARGET + first_col + row + positive_at, mask=ok, other=0.0)
            g = tl.where(col[None, :] == (row + positive_at)[:, None], g - target[:, None], g)
        if is_edge | has_excluded:
            kept = col_ok[None, :] & (col[None, :] != (row + excluded_at)[:, None])
            g = tl.where(kept, g, 0.0)
            raw = tl.where(kept, raw, 0.0)

    row_g_raw = tl.sum(g * raw, axis=1)
    if WITH_GRAD:
        store_gradient(
            GRAD, g, first_row, first_col, row_ok, cols_left, is_edge, stride_gm,
            DESCRIPTORS, FP16_GRADIENT_SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return row_g_raw


@triton.jit(
    do_not_specialize=["m", "n", "positive", "excluded"],
    do_not_specialize_on_alignment=[
        "X_IDS", "Y_IDS", "ROW_TOP", "COL_TOP", "ROW_SHARE", "COL_SHARE", "ROW_TARGET", "COL_TARGET",
        "ROW_UNIFORM", "COL_UNIFORM",
    ],
)  # fmt: skip
def _softmax_grad_kernel(
    X,  # [m, D]; this, Y and GRAD perhaps as descriptors, see operands
    Y,  # [n, D]
    GRAD,  # [m, n], or None without WITH_GRAD
    PARTIALS,  # [cdiv(n, BLOCK_N), m] fp32
    SCALE,
    X_IDS,  # [m] int64, or None without HAS_IDS
    Y_IDS,  # [n]
    ROW_TOP,  # this and what follows: [m] or [n] fp32
    COL_TOP,
    ROW_SHARE,
    COL_SHARE,
    ROW_TARGET,
    COL_TARGET,
    ROW_UNIFORM,  # or None without HAS_UNIFORM
    COL_UNIFORM,
    m: tl.int64,
    n: tl.int64,
    D,
    positive: tl.int64,
    excluded: tl.int64,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_gm,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    WITH_GRAD: tl.constexpr,
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

    scale = tl.load(SCALE) * _LOG2_E
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    row_top, row_share = _load_side(ROW_TOP, ROW_SHARE, row, row < m)
    col_top, col_share = _load_side(COL_TOP, COL_SHARE, col, col < n)
    highest = tl.maximum(
        tl.max(tl.where(row_share != 0.0, row_top * scale, float("-inf")), axis=0),
        tl.max(tl.where(col_share != 0.0, col_top * scale, float("-inf")), axis=0),
    )
    row_factor = _factors(row_top, row_share, scale, highest)
    col_factor = _factors(col_top, col_share, scale, highest)
    largest = tl.maximum(
        tl.max(_exponent_of_factor(row_top, row_share, scale, highest), axis=0),
        tl.max(_exponent_of_factor(col_top, col_share, scale, highest), axis=0),
    )
    is_narrow = (largest <= _LARGEST_EXPONENT) & (tl.abs(highest) <= _FARTHEST)
    if HALVES:
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = split_columns(raw, BLOCK_M, BLOCK_N)
        left_factor, right_factor = tl.split(tl.permute(tl.reshape(col_factor, (2, WIDTH)), (1, 0)))
        row_g_raw = _grad_epilogue(
            left, GRAD, X_IDS, Y_IDS, ROW_TOP, COL_TOP, ROW_SHARE, COL_SHARE, ROW_TARGET, COL_TARGET, ROW_UNIFORM,
            COL_UNIFORM, scale, highest, is_narrow, row_factor, left_factor, m, n, positive, excluded, first_row,
            first_col, stride_gm, HAS_IDS, IGNORE_SAME_ID, HAS_UNIFORM, WITH_GRAD, DESCRIPTORS, BLOCK_M, WIDTH,
        )  # fmt: skip
        row_g_raw += _grad_epilogue(
            right, GRAD, X_IDS, Y_IDS, ROW_TOP, COL_TOP, ROW_SHARE, COL_SHARE, ROW_TARGET, COL_TARGET, ROW_UNIFORM,
            COL_UNIFORM, scale, highest, is_narrow, row_factor, right_factor, m, n, positive, excluded, first_row,
            first_col + WIDTH, stride_gm, HAS_IDS, IGNORE_SAME_ID, HAS_UNIFORM, WITH_GRAD, DESCRIPTORS, BLOCK_M, WIDTH,
        )  # fmt: skip
    else:
        row_g_raw = _grad_epilogue(
            raw, GRAD, X_IDS, Y_IDS, ROW_TOP, COL_TOP, ROW_SHARE, COL_SHARE, ROW_TARGET, COL_TARGET, ROW_UNIFORM,
            COL_UNIFORM, scale, highest, is_narrow, row_factor, col_factor, m, n, positive, excluded, first_row,
            first_col, stride_gm, HAS_IDS, IGNORE_SAME_ID, HAS_UNIFORM, WITH_GRAD, DESCRIPTORS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    partial_at = PARTIALS + block_n.to(tl.int64) * m + first_row + tl.arange(0, BLOCK_M)
    tl.store(partial_at, row_g_raw, mask=first_row + tl.arange(0, BLOCK_M) < m)


def softmax_grad(
    x: Tensor,
    y: Tensor,
    grad: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    positive: int,
    excluded: int,
    row_top: Tensor,
    col_top: Tensor,
    row_share: Tensor,
    col_share: Tensor,
    row_target: Tensor,
    col_target: Tensor,
    row_uniform: Tensor | None,
    col_uniform: Tensor | None,
    *,
    config: Config | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write the gradient tile G of one panel to ``grad``, and add its row sums of G (x_i . y_j) to ``stats``.

    Args:
        x, y, scale, x_ids, y_ids, ignore_same_id, positive, excluded, config: as for ``softmax_stats``.
        grad: [m, n] in the dtype of x with unit stride along n, receives G times :func:`gradient_scale`; None where no
            feature gradient is wanted.
        stats: [m, 1] float64.
        row_top: [m] fp32, contiguous, as are all that follow: a maximum of x_i . y_j in each row, at least its own.
        col_top: [n], of the columns.
        row_share: [m], of exp(scale (x_i . y_j - row_top)): the weight of the row over the sum of these exponentials.
            At 0 the row takes no part.
        col_share: [n], likewise.
        row_target: [m], subtracted from positive pairs.
        col_target: [n], likewise.
        row_uniform: [m], subtracted from every kept pair; or None, together with ``col_uniform``.
        col_uniform: [n], likewise.
        scratch: of the pass, which then adds the sums up; for panels of one shape the configuration is chosen once.
    """
    m, n, width, has_ids = x.shape[0], y.shape[0], x.shape[1], x_ids is not None

    own = scratch or Scratch(n, 0)

    def plan(config: Config) -> tuple[Config, dict[str, Any]]:
        smoothed = row_uniform is not None
        fitted = config_for(config, device_traits(x.device)[0], has_ids, smoothed, with_grad=True)
        fitted = suited(fitted, x, y, grad)
        kind = product_kind(x)
        return fitted, kernel_constants(fitted, kind, width, has_ids, ignore_same_id, smoothed, grad is not None)

    def launch(config: Config, constants: dict[str, Any], partials: Tensor) -> None:
        """Row sums by column block, to ``partials``."""
        with on_device(x.device):
            _softmax_grad_kernel[(cdiv(m, config.block_m) * partials.shape[0],)](
                *operands(config, x, y, grad, own.descriptors),
                partials,
                scale,
                x_ids,
                y_ids,
                row_top,
                col_top,
                row_share,
                col_share,
                row_target,
                col_target,
                row_uniform,
                col_uniform,
                m,
                n,
                width,
                nearest_diagonal(positive, m, n),
                nearest_diagonal(excluded, m, n),
                *x.stride(),
                *y.stride(),
                0 if grad is None else grad.stride(0),
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )

    def attempt(config: Config) -> None:
        fitted, constants = plan(config)
        launch(fitted, constants, stats.new_empty(cdiv(n, fitted.block_n), 1, m, dtype=torch.float32))

    fitted, constants = own.once(
        (m, n), lambda: plan(config or choose_config("softmax_grad", x, y, grad, attempt, has_ids=has_ids))
    )
    launch(fitted, constants, own.partials(stats, cdiv(n, fitted.block_n), n))
    if scratch is None:
        own.reduce()


def kernel_constants(
    config: Config, kind: str, width: int, has_ids: bool, ignore_same_id: bool, has_uniform: bool, with_grad: bool
) -> dict[str, Any]:
    """The compile-time arguments of the kernel. What is not wanted is not compiled in."""
    shared = pair_constants(config, kind, width, has_ids, ignore_same_id)
    return {**shared, "HAS_UNIFORM": has_uniform, "WITH_GRAD": with_grad}
