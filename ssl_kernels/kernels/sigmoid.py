r"""Triton tile kernel of the sigmoid contrastive loss.

For panels x [m, D] and y [n, D], in one visit to each element of the m x n similarities:

    raw_ij = x_i . y_j            fp32 accumulator of the matrix product
    z_ij   = scale raw_ij + bias
    s_ij   = -z_ij on positive pairs, z_ij on negative ones
    loss_ij = softplus(s_ij)                        G_ij = d loss_ij / d z_ij = -sigma(s_ij) or +sigma(s_ij)

G lies in [-1, 1], so it is written in the dtype of the features (in fp16 times 2^15, see gradient_scale); scale, 1/M
and the upstream gradient multiply the fp32 products made of it, never G itself. Row sums of loss, G raw and G (for the
loss, d scale and d bias) go to a buffer with one slot per column block and are added in a fixed order: the result is
bitwise reproducible.

Derivation of the epilogue: one exponential and one reciprocal square root per element, no logarithm, no division.
With e = exp(-|s|) in (0, 1] and r = (1 + e)^(-1/2),

    sigma(s)    = r^2 where s >= 0, e r^2 elsewhere
    softplus(s) = max(s, 0) + log(1 + e)
    log(1 + e)  = 2 asinh(e r / 2),        because sinh(log(1 + e) / 2) = (sqrt(1 + e) - 1 / sqrt(1 + e)) / 2 = e r / 2

asinh is odd and its nearest singularity is +-i, so with w = e r in (0, 0.71] three terms of log(1 + e) = w P(w^2),
P(t) = 1 + c1 t + c2 t^2 + c3 t^3, give a relative error of 5.6e-8 for every e, however small: P(0) is exactly 1, so
log(1 + e) -> e. A polynomial in e itself needs degree 8 for as much, since log(1 + e) is singular at e = -1. No term
cancels: a confident positive has a small e and the loss e, not softplus(z) - z. The exponent |s| keeps NaN, and e = NaN
reaches loss and G whichever way the comparisons fall.

The instructions round a little: ex2 and rsqrt of the hardware err by 2^-22 or so, hence loss and G by a few 1e-7.

Budget per element of the tile, with everything wanted (compiled, not timed; tests/triton_kernels/ keeps the figures):

    matrix product       2 D FLOP on the tensor cores
    softplus and sigma   13 instructions, of which 2 are special functions (ex2, rsqrt). For comparison, compiled alike
                         for sm_90: a polynomial of degree 8 in e with a reciprocal 20, the logarithm of a running
                         product of 32 factors (1 + e) with a series for small e 24, `tl.log` 33, the formula 40
    the rest             about 5: z, three row sums, conversion and store. At 18 in all an H100 issues the epilogue in
                         the time in which its tensor cores advance by 290 of D in 16 bits
    global memory        (1 / block_m + 1 / block_n) D elements read, shared in L2 by the grouped order of the programs;
                         one element of G written; 12 / block_n bytes of row sums

Positive pairs of the diagonal and the ragged edge are dealt with where they are, behind branches that are uniform over
the program, so that most tiles pay nothing for them; with ids every pair is compared, in 64 bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.tiles import (
    CONFIGS,
    Config,
    choose_config,
    locate_tile,
    on_device,
    product_kind,
    similarities,
    split_columns,
)

__all__ = ["CONFIGS", "Config", "gradient_scale", "kernel_constants", "sigmoid_panel"]

# log(1 + e) = w P(w^2), w = e / sqrt(1 + e): minimax in relative error over e in (0, 1], P(0) = 1
_C1 = tl.constexpr(-0.04166441038250923)
_C2 = tl.constexpr(0.004659461788833141)
_C3 = tl.constexpr(-0.0005965688033029437)
_FP16_GRADIENT_SCALE = tl.constexpr(2.0**15)


@triton.jit
def _softplus_and_sigma(s):
    """softplus(s) and sigma(s), as derived at the top of the module."""
    e = tl.exp2(tl.abs(s) * -1.4426950408889634)  # log2(e)
    r = tl.rsqrt(1.0 + e)
    w = e * r
    t = w * w
    softplus = w * (((_C3 * t + _C2) * t + _C1) * t + 1.0) + tl.maximum(s, 0.0)
    positive_sigma = r * r
    return softplus, tl.where(s >= 0.0, positive_sigma, e * positive_sigma)


@triton.jit
def _epilogue(
    raw,  # [BLOCK_M, BLOCK_N] fp32
    GRAD,
    X_IDS,
    Y_IDS,
    scale,
    bias,
    m,
    n,
    diagonal,
    first_row,
    first_col,
    stride_gm,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write G of a block of similarities and return its row sums of loss, G raw and G, each [BLOCK_M]."""
    # Within the block everything is counted in 32 bits from its first row and column.
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    row_ok = row < tl.minimum(m - first_row, BLOCK_M).to(tl.int32)
    cols_left = tl.maximum(tl.minimum(n - first_col, BLOCK_N), 0).to(tl.int32)
    is_edge = cols_left < BLOCK_N
    # Column of the first row's positive, clamped to where the diagonal no longer meets the block.
    delta = tl.minimum(tl.maximum(diagonal + first_row - first_col, -BLOCK_M), BLOCK_N).to(tl.int32)
    has_diagonal = (delta > -BLOCK_M) & (delta < cols_left)
    POSITIVE_IDS: tl.constexpr = HAS_IDS and not IGNORE_SAME_ID

    # A pair that is not to be counted here gets s = -inf, which makes e, loss and G zero, and raw = 0, since 0 times a
    # NaN or an infinity would count. Without ids a row has at most one positive: its product is taken out of the block,
    # and what it adds is worked out on vectors [BLOCK_M].
    s = raw * scale + bias
    positive_raw = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_IDS:
        x_id = tl.load(X_IDS + first_row + row, mask=row_ok, other=0)
        y_id = tl.load(Y_IDS + first_col + col, mask=col < cols_left, other=0)
        same_id = x_id[:, None] == y_id[None, :]
    if POSITIVE_IDS:
        positive = same_id | (col[None, :] == (row + delta)[:, None])
        s = tl.where(positive, -s, s)
        if is_edge:
            beyond = (col >= cols_left)[None, :]
            s = tl.where(beyond, float("-inf"), s)
            raw = tl.where(beyond, 0.0, raw)
    else:
        if is_edge | has_diagonal:
            on_diagonal = col[None, :] == (row + delta)[:, None]
            positive_raw = tl.sum(tl.where(on_diagonal, raw, 0.0), axis=1)
            elsewhere = on_diagonal | (col >= cols_left)[None, :]
            s = tl.where(elsewhere, float("-inf"), s)
            raw = tl.where(elsewhere, 0.0, raw)
    if IGNORE_SAME_ID:
        s = tl.where(same_id, float("-inf"), s)
        raw = tl.where(same_id, 0.0, raw)

    loss, g = _softplus_and_sigma(s)
    if POSITIVE_IDS:
        g = tl.where(positive, -g, g)
    row_loss = tl.sum(loss, axis=1)
    row_g_raw = tl.sum(g * raw, axis=1)
    row_g = tl.sum(g, axis=1)
    if WITH_GRAD:
        GRAD_SCALE: tl.constexpr = _FP16_GRADIENT_SCALE if GRAD.dtype.element_ty == tl.float16 else 1.0
        g = (g * GRAD_SCALE).to(GRAD.dtype.element_ty)
    if not POSITIVE_IDS:  # noqa: SIM102  (decided when compiled; the next one when run)
        if has_diagonal:
            has_positive = (row + delta >= 0) & (row + delta < cols_left)
            positive_raw = tl.where(has_positive, positive_raw, 0.0)
            positive_loss, positive_sigma = _softplus_and_sigma(-(positive_raw * scale + bias))
            positive_g = tl.where(has_positive, -positive_sigma, 0.0)
            row_loss += tl.where(has_positive, positive_loss, 0.0)
            row_g_raw += positive_g * positive_raw
            row_g += positive_g
            if WITH_GRAD:
                on_diagonal = col[None, :] == (row + delta)[:, None]
                g = tl.where(on_diagonal, (positive_g * GRAD_SCALE).to(g.dtype)[:, None], g)
    if WITH_GRAD:
        grad_at = GRAD + first_col + (first_row + row)[:, None] * stride_gm + col[None, :]
        if is_edge:
            tl.store(grad_at, g, mask=row_ok[:, None] & (col < cols_left)[None, :])
        else:  # a mask that is constant along the row leaves the stores wide
            tl.store(grad_at, g, mask=row_ok[:, None])
    return row_loss, row_g_raw, row_g


# The sizes and the diagonal change from panel to panel and batch to batch: specialising on their divisibility or on
# the value 1 would recompile in the middle of training. Strides and D are fixed by the model, and 16-byte alignment of
# the rows is what makes loads wide, so those do specialise (at most three variants each).
@triton.jit(do_not_specialize=["m", "n", "diagonal"])
def _sigmoid_panel_kernel(
    X,  # [m, D]
    Y,  # [n, D]
    GRAD,  # [m, n], or None without WITH_GRAD
    PARTIALS,  # [cdiv(n, BLOCK_N), 1 if LOSS_ONLY else 3, m] fp32
    SCALE,
    BIAS,
    X_IDS,  # [m] int64, or None without HAS_IDS
    Y_IDS,  # [n]
    m: tl.int64,
    n: tl.int64,
    D,
    diagonal: tl.int64,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_gm,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    LOSS_ONLY: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    EVEN_D: tl.constexpr,
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
        EVEN_D, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    scale = tl.load(SCALE)
    bias = tl.load(BIAS)
    if HALVES:  # the left columns and then the right: half as much of the epilogue is in registers at a time
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = split_columns(raw, BLOCK_M, BLOCK_N)
        row_loss, row_g_raw, row_g = _epilogue(
            left, GRAD, X_IDS, Y_IDS, scale, bias, m, n, diagonal, first_row, first_col, stride_gm,
            HAS_IDS, IGNORE_SAME_ID, WITH_GRAD, BLOCK_M, WIDTH,
        )  # fmt: skip
        right_loss, right_g_raw, right_g = _epilogue(
            right, GRAD, X_IDS, Y_IDS, scale, bias, m, n, diagonal, first_row, first_col + WIDTH, stride_gm,
            HAS_IDS, IGNORE_SAME_ID, WITH_GRAD, BLOCK_M, WIDTH,
        )  # fmt: skip
        row_loss += right_loss
        row_g_raw += right_g_raw
        row_g += right_g
    else:
        row_loss, row_g_raw, row_g = _epilogue(
            raw, GRAD, X_IDS, Y_IDS, scale, bias, m, n, diagonal, first_row, first_col, stride_gm,
            HAS_IDS, IGNORE_SAME_ID, WITH_GRAD, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    partial_at = PARTIALS + block_n.to(tl.int64) * (1 if LOSS_ONLY else 3) * m + first_row + tl.arange(0, BLOCK_M)
    row_ok = first_row + tl.arange(0, BLOCK_M) < m
    tl.store(partial_at, row_loss, mask=row_ok)
    if not LOSS_ONLY:
        tl.store(partial_at + m, row_g_raw, mask=row_ok)
        tl.store(partial_at + 2 * m, row_g, mask=row_ok)


def gradient_scale(dtype: torch.dtype) -> float:
    """The power of two that G carries in the gradient tile; whoever multiplies with the tile takes it out in fp32.

    Most negatives have a sigmoid of 1e-4 to 1e-8, below the normal range of fp16; times 2^15, G still fits.
    """
    return float(_FP16_GRADIENT_SCALE.value) if dtype == torch.float16 else 1.0


def sigmoid_panel(
    x: Tensor,
    y: Tensor,
    grad: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    diagonal: int,
    *,
    config: Config | None = None,
) -> None:
    """Add the row sums of one panel to ``stats`` and write its gradient tile to ``grad``.

    Args:
        x: rows [m, D] in fp32, bf16 or fp16, any strides; m and D at least 1.
        y: columns [n, D], of the same dtype, any strides; n at least 1.
        grad: [m, n] in that dtype with unit stride along n, receives G times :func:`gradient_scale`; None where no
            feature gradient is wanted.
        stats: [m, 3] float64, to which the row sums of loss, G (x_i . y_j) and G are added; [m, 1] for the loss alone.
        scale: 0-dim fp32 on the device.
        bias: likewise.
        x_ids: [m] int64, contiguous, or None.
        y_ids: [n] likewise, given together with ``x_ids``.
        ignore_same_id: leave pairs of equal ids out of every sum (G = 0) instead of making them positives.
        diagonal: (i, j) is positive, whatever the ids, where j = i + diagonal.
        config: an entry of CONFIGS, by default the one that :func:`choose_config` names.
    """
    m, n, width = x.shape[0], y.shape[0], x.shape[1]
    config = config or choose_config(x, y, grad)
    columns = triton.cdiv(n, config.block_n)
    partials = torch.empty(columns, stats.shape[1], m, dtype=torch.float32, device=x.device)
    constants = kernel_constants(
        config, product_kind(x), width, x_ids is not None, ignore_same_id, stats.shape[1] == 1, grad is not None
    )
    grid = (triton.cdiv(m, config.block_m) * columns,)
    with on_device(x.device):
        _sigmoid_panel_kernel[grid](
            x,
            y,
            grad,
            partials,
            scale,
            bias,
            x_ids,
            y_ids,
            m,
            n,
            width,
            max(min(diagonal, n), -m),  # beyond these no pair of the panel is on the diagonal
            *x.stride(),
            *y.stride(),
            0 if grad is None else grad.stride(0),
            **constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    stats += partials.sum(dim=0, dtype=torch.float64).t()


def kernel_constants(
    config: Config,
    kind: str,
    width: int,
    has_ids: bool,
    ignore_same_id: bool,
    loss_only: bool,
    with_grad: bool,
) -> dict[str, Any]:
    """The compile-time arguments of the kernel. What is not wanted is not compiled in."""
    return {
        "HAS_IDS": has_ids,
        "IGNORE_SAME_ID": has_ids and ignore_same_id,
        "LOSS_ONLY": loss_only,
        "WITH_GRAD": with_grad and not loss_only,
        "EVEN_D": width % config.block_d == 0,
        "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "GROUP_M": config.group_m,
        "HALVES": config.halves,
    }
