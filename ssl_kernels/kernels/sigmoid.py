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

Derivation of the epilogue: one exponential per element, for the gradient one reciprocal square root as well, no
logarithm, no division. With e = exp(s) and r = (1 + e)^(-1/2),

    sigma(s) = e r^2          sum_j softplus(s_j) = log prod_j (1 + e_j)

so the loss of a row takes two instructions per element: q <- q + (q e + e) keeps prod (1 + e) - 1 with full relative
precision however small the e are, and one log(1 + q) follows for the row. No term cancels: a confident positive has a
small e and the loss e, not softplus(z) - z. The product holds 2^120 at most, which takes logits that add up to 83 in
one row of the block. If any row has more, or a NaN, the block is worked out element by element with e = exp(-|s|), r as
before, sigma = r^2 where s >= 0 and e r^2 elsewhere, and softplus = max(s, 0) + log(1 + e).

For e in (0, 1], log(1 + e) = 2 asinh(e r / 2), because sinh(log(1 + e) / 2) = (sqrt(1 + e) - 1 / sqrt(1 + e)) / 2 =
e r / 2. asinh is odd and its nearest singularity is +-i, so with w = e r in (0, 0.71] three terms of log(1 + e) =
w P(w^2), P(t) = 1 + c1 t + c2 t^2 + c3 t^3, give a relative error of 5.6e-8 for every e, however small: P(0) is exactly
1, so log(1 + e) -> e. A polynomial in e itself needs degree 8 for as much, since log(1 + e) is singular at e = -1. The
logarithm of a row's product is that of its fraction in [1, 2), plus its binary exponent times log 2.

The instructions round a little: ex2 and rsqrt of the hardware err by 2^-22 or so, hence loss and G by a few 1e-7.

Budget per element, compiled for sm_90 and followed through the code, not timed: a tile of 256 x 128 in bf16, D = 768,
that meets neither an edge nor the diagonal (tests/triton_kernels/ keeps the figures):

    matrix product       2 D FLOP on the tensor cores
    instructions         14 for the loss alone, 1 of them a special function: 2 before the product, 5 in its loop, 7 of
                         epilogue. 23 with the gradient and all sums, 2 of them special functions; 15 of epilogue
    global memory        (1 / block_m + 1 / block_n) D elements read, shared in L2 by the grouped order of the programs;
                         one element of G written, once; 12 / block_n bytes of row sums

At 128 instructions and 4096 FLOP per cycle and multiprocessor, 23 instructions are issued in the time of 368 of D.

Positive pairs of the diagonal and the ragged edge are dealt with where they are, behind branches that are uniform over
the program, so that most tiles pay nothing for them; with ids every pair is compared, in 64 bits.
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
from ssl_kernels.kernels.configs import (
    CONFIGS,
    HAS_OLD_TRITON,
    Config,
    choose_config,
    device_traits,
    narrowed,
    product_kind,
)
from ssl_kernels.kernels.scratch import Scratch
from ssl_kernels.kernels.tiles import (
    cdiv,
    diagonal_in_block,
    have_same_id,
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

__all__ = ["CONFIGS", "Config", "config_for", "gradient_scale", "kernel_constants", "sigmoid_panel"]

# log(1 + e) = w P(w^2), w = e / sqrt(1 + e): minimax in relative error over e in (0, 1], P(0) = 1
_C1 = tl.constexpr(-0.04166441038250923)
_C2 = tl.constexpr(0.004659461788833141)
_C3 = tl.constexpr(-0.0005965688033029437)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LARGEST_PRODUCT = tl.constexpr(2.0**120)
# Most negatives have a sigmoid of 1e-4 to 1e-8, below the normal range of fp16; times 2^15, G still fits.
_FP16_GRADIENT_SCALE = tl.constexpr(2.0**15)
gradient_scale = functools.partial(tiles.gradient_scale, in_fp16=_FP16_GRADIENT_SCALE)


@triton.jit
def _log1p(w):
    """log(1 + e) of w = e / sqrt(1 + e), for e in [0, 1]."""
    t = w * w
    return w * (((_C3 * t + _C2) * t + _C1) * t + 1.0)


@triton.jit
def _softplus_and_sigma(s):
    """softplus(s) and sigma(s) one by one, as derived at the top of the module."""
    e = tl.exp2(tl.abs(s) * -_LOG2_E)
    r = tl.rsqrt(1.0 + e)
    positive_sigma = r * r
    return _log1p(e * r) + tl.maximum(s, 0.0), tl.where(s >= 0.0, positive_sigma, e * positive_sigma)


@triton.jit
def _times(p, q):
    """(1 + p) (1 + q) - 1, without the loss of what is small beside 1."""
    return p + (p * q + q)


@triton.jit
def _log_of_product(q):
    """log(1 + q) for q from 0 to _LARGEST_PRODUCT."""
    bits = (1.0 + q).to(tl.int32, bitcast=True)
    is_small = q <= 1.0
    e = tl.where(is_small, q, ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0)
    exponent = tl.where(is_small, 0, (bits >> 23) - 127)
    return _log1p(e * tl.rsqrt(1.0 + e)) + exponent.to(tl.float32) * _LN_2


@triton.jit
def _uncounted(row, col, cols_left, delta, POSITIVE_IDS: tl.constexpr):
    """Pairs beyond the panel and, without ids, on the diagonal. Made anew in each branch: over them it would be held in
    registers, and made in every tile."""
    beyond = (col >= cols_left)[None, :]
    return beyond if POSITIVE_IDS else beyond | (col[None, :] == (row + delta)[:, None])


@triton.jit
def _exponents(
    raw,
    scale,
    bias,
    positive,
    same_id,
    row,
    col,
    cols_left,
    delta,
    has_uncounted,
    POSITIVE_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
):
    """s of a block, -inf where a pair is not to be counted here, which makes e, loss and G zero."""
    s = raw * scale + bias
    if POSITIVE_IDS:
        s = tl.where(positive, -s, s)
    if has_uncounted:
        s = tl.where(_uncounted(row, col, cols_left, delta, POSITIVE_IDS), float("-inf"), s)
    if IGNORE_SAME_ID:
        s = tl.where(same_id, float("-inf"), s)
    return s


@triton.jit
def _epilogue(
    raw,  # [BLOCK_M, BLOCK_N] fp32
    GRAD,
    X_IDS,
    Y_IDS,
    scale,
    bias,
    first_row,
    first_col,
    rows_left,  # within the block everything is counted in 32 bits from its first row and column
    cols_left,
    delta,  # column of the first row's positive
    stride_gm,
    HAS_IDS: tl.constexpr,
    IGNORE_SAME_ID: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write G of a block of similarities and return its row sums of loss, G raw and G, each [BLOCK_M]."""
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    row_ok = row < rows_left
    cols_left = tl.minimum(cols_left, BLOCK_N)
    is_edge = cols_left < BLOCK_N
    has_diagonal = (delta > -BLOCK_M) & (delta < cols_left)
    POSITIVE_IDS: tl.constexpr = HAS_IDS and not IGNORE_SAME_ID

    has_uncounted = is_edge if POSITIVE_IDS else is_edge | has_diagonal

    same_id = False
    positive = False
    if HAS_IDS:
        same_id = have_same_id(X_IDS, Y_IDS, first_row, first_col, row, col, row_ok, cols_left)
    if POSITIVE_IDS:
        positive = same_id | (col[None, :] == (row + delta)[:, None])
    # Without ids a row has at most one positive: its product is taken out of the block, and what it adds is worked out
    # on vectors [BLOCK_M]. Where a pair is not counted raw is 0, since 0 times a NaN or an infinity would count.
    positive_raw = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if has_uncounted:
        if not POSITIVE_IDS:
            positive_raw = tl.sum(tl.where(col[None, :] == (row + delta)[:, None], raw, 0.0), axis=1)
        raw = tl.where(_uncounted(row, col, cols_left, delta, POSITIVE_IDS), 0.0, raw)
    if IGNORE_SAME_ID:
        raw = tl.where(same_id, 0.0, raw)

    s = _exponents(
        raw, scale * _LOG2_E, bias * _LOG2_E, positive, same_id, row, col, cols_left, delta, has_uncounted,
        POSITIVE_IDS, IGNORE_SAME_ID,
    )  # fmt: skip
    e = tl.exp2(s)
    r = tl.rsqrt(1.0 + e)
    g = e * r * r
    product = tl.reduce(e, 1, _times)
    row_loss = _log_of_product(product)
    if tl.sum((product <= _LARGEST_PRODUCT).to(tl.int32), axis=0) < BLOCK_M:
        s = _exponents(
            raw, scale, bias, positive, same_id, row, col, cols_left, delta, has_uncounted,
            POSITIVE_IDS, IGNORE_SAME_ID,
        )  # fmt: skip
        loss, g = _softplus_and_sigma(s)
        row_loss = tl.sum(loss, axis=1)
    if POSITIVE_IDS:
        g = tl.where(positive, -g, g)
    row_g_raw = tl.sum(g * raw, axis=1)
    row_g = tl.sum(g, axis=1)
    if not POSITIVE_IDS:  # noqa: SIM102  (decided when compiled; the next one when run)
        if has_diagonal:
            has_positive = (row + delta >= 0) & (row + delta < cols_left)
            positive_raw = tl.where(has_positive, positive_raw, 0.0)
            positive_loss, positive_sigma = _softplus_and_sigma(-(positive_raw * scale + bias))
            positive_g = tl.where(has_positive, -positive_sigma, 0.0)
            row_loss += tl.where(has_positive, positive_loss, 0.0)
            row_g_raw += positive_g * positive_raw
            row_g += positive_g
            g = tl.where(col[None, :] == (row + delta)[:, None], positive_g[:, None], g)
    if WITH_GRAD:
        store_gradient(
            GRAD, g, first_row, first_col, row_ok, cols_left, is_edge, stride_gm,
            DESCRIPTORS, _FP16_GRADIENT_SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return row_loss, row_g_raw, row_g


# The sizes and the diagonal change from panel to panel and batch to batch: specialising on their divisibility or on
# the value 1 would recompile in the middle of training. Strides and D are fixed by the model, and 16-byte alignment of
# the rows is what makes loads wide, so those do specialise (at most three variants each).
@triton.jit(do_not_specialize=["m", "n", "diagonal"])
def _sigmoid_panel_kernel(
    X,  # [m, D]; this, Y and GRAD perhaps as descriptors, see operands
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
    tl.assume(D > 0)  # or zeros would be made twice
    raw = similarities(
        X, Y, m, n, D, first_row, first_col, stride_xm, stride_xd, stride_yn, stride_yd,
        EVEN_D, DESCRIPTORS, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    scale = tl.load(SCALE)
    bias = tl.load(BIAS)
    rows_left = tl.minimum(m - first_row, BLOCK_M).to(tl.int32)
    cols_left = tl.minimum(n - first_col, BLOCK_N).to(tl.int32)  # of the right half perhaps less than none
    delta = diagonal_in_block(diagonal, first_row, first_col, BLOCK_M, BLOCK_N)
    if HALVES:  # the left columns and then the right: half as much of the epilogue is in registers at a time
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = split_columns(raw, BLOCK_M, BLOCK_N)
        row_loss, row_g_raw, row_g = _epilogue(
            left, GRAD, X_IDS, Y_IDS, scale, bias, first_row, first_col, rows_left, cols_left, delta, stride_gm,
            HAS_IDS, IGNORE_SAME_ID, WITH_GRAD, DESCRIPTORS, BLOCK_M, WIDTH,
        )  # fmt: skip
        right_loss, right_g_raw, right_g = _epilogue(
            right, GRAD, X_IDS, Y_IDS, scale, bias, first_row, first_col + WIDTH, rows_left, cols_left - WIDTH,
            delta - WIDTH, stride_gm,
            HAS_IDS, IGNORE_SAME_ID, WITH_GRAD, DESCRIPTORS, BLOCK_M, WIDTH,
        )  # fmt: skip
        row_loss += right_loss
        row_g_raw += right_g_raw
        row_g += right_g
    else:
        row_loss, row_g_raw, row_g = _epilogue(
            raw, GRAD, X_IDS, Y_IDS, scale, bias, first_row, first_col, rows_left, cols_left, delta, stride_gm,
            HAS_IDS, IGNORE_SAME_ID, WITH_GRAD, DESCRIPTORS, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    partial_at = PARTIALS + block_n.to(tl.int64) * (1 if LOSS_ONLY else 3) * m + first_row + tl.arange(0, BLOCK_M)
    row_ok = first_row + tl.arange(0, BLOCK_M) < m
    tl.store(partial_at, row_loss, mask=row_ok)
    if not LOSS_ONLY:
        tl.store(partial_at + m, row_g_raw, mask=row_ok)
        tl.store(partial_at + 2 * m, row_g, mask=row_ok)


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
    scratch: Scratch | None = None,
) -> None:
    """Add the row sums of one panel to ``stats`` and write its gradient tile to ``grad``.

    Args:
        x: rows [m, D] in fp32, bf16 or fp16, any strides; m at least 1.
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
        scratch: of the pass, which then adds the sums up; for panels of one shape the configuration is chosen once.
    """
    if x.shape[1] == 0:  # the kernel is compiled for at least one feature
        x, y = x.new_zeros(x.shape[0], 1), y.new_zeros(y.shape[0], 1)
    m, n, width, has_ids = x.shape[0], y.shape[0], x.shape[1], x_ids is not None

    own = scratch or Scratch(n, 0)

    def plan(config: Config) -> tuple[Config, dict[str, Any]]:
        fitted = suited(config_for(config, device_traits(x.device)[0], has_ids), x, y, grad)
        loss_only = stats.shape[1] == 1
        return fitted, kernel_constants(
            fitted, product_kind(x), width, has_ids, ignore_same_id, loss_only, grad is not None
        )

    def launch(config: Config, constants: dict[str, Any], partials: Tensor) -> None:
        """Row sums by column block, to ``partials``."""
        with on_device(x.device):
            _sigmoid_panel_kernel[(cdiv(m, config.block_m) * partials.shape[0],)](
                *operands(config, x, y, grad, own.descriptors),
                partials,
                scale,
                bias,
                x_ids,
                y_ids,
                m,
                n,
                width,
                nearest_diagonal(diagonal, m, n),
                *x.stride(),
                *y.stride(),
                0 if grad is None else grad.stride(0),
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )

    def attempt(config: Config) -> None:
        fitted, constants = plan(config)
        launch(fitted, constants, stats.new_empty(cdiv(n, fitted.block_n), *stats.shape[::-1], dtype=torch.float32))

    fitted, constants = own.once(
        (m, n), lambda: plan(config or choose_config("sigmoid", x, y, grad, attempt, has_ids=has_ids))
    )
    launch(fitted, constants, own.partials(stats, cdiv(n, fitted.block_n), n))
    if scratch is None:
        own.reduce()


def config_for(config: Config, family: str, has_ids: bool) -> Config:
    """The masks of ids take registers that the largest tiles do not leave."""
    if HAS_OLD_TRITON and family == "gfx9":
        return narrowed(config, 32)
    return narrowed(config, 64 if family == "sm_90" else 32) if has_ids and config.descriptors else config


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
    shared = pair_constants(config, kind, width, has_ids, ignore_same_id)
    return {**shared, "LOSS_ONLY": loss_only, "WITH_GRAD": with_grad and not loss_only}
