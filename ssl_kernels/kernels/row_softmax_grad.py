r"""Triton tile kernel of the softmax over rows, second visit: the gradient tile (see row_softmax.py).

Weights are at most 1 in magnitude, so |G| <= 2; G is written in the dtype of the features (in fp16 times 2^14, see
softmax_grad.gradient_scale).

Budget per element: 16 instructions, 5 of them in the loop of the product: subtraction, multiplication, ex2,
multiplication, the row's sum of G s, and the store. Written: one element of G, once, in the dtype of the features;
4 / block_n bytes of row sums, and with a bias 4 / block_m bytes of column sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.configs import Config
from ssl_kernels.kernels.row_softmax import (
    SIZES,
    SLICES,
    Pairs,
    chosen_config,
    fitted,
    guided_similarities,
    launch_arguments,
    load_bias,
    load_scales,
    load_unit,
    pair_constants,
    target_in_block,
    values,
)
from ssl_kernels.kernels.softmax_grad import FP16_GRADIENT_SCALE
from ssl_kernels.kernels.tiles import (
    cdiv,
    left_in_block,
    locate_tile,
    on_device,
    operands,
    split_columns,
    store_gradient,
    suited,
)

__all__ = ["row_softmax_grad"]


@triton.jit
def _grad_epilogue(
    raw,  # [BLOCK_M, BLOCK_N] fp32
    GRAD,
    COL_PARTIALS,
    TARGET,
    X_IDS,
    Y_IDS,
    SCALES,
    BIAS,
    TOP,
    SHARE,
    TARGETS,
    ALL,
    unit,
    m,
    n,
    block_m,
    first_row,
    first_col,
    stride_gm,
    HAS_IDS: tl.constexpr,
    SAME_ID: tl.constexpr,
    GUIDED: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALL: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WITH_COLS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write G of a block of similarities and return its row sums of G s, [BLOCK_M]."""
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    row_ok = row < left_in_block(m, first_row, BLOCK_M)
    cols_left = left_in_block(n, first_col, BLOCK_N)
    is_edge = cols_left < BLOCK_N
    target_at = target_in_block(TARGET, first_row, first_col, row, row_ok, BLOCK_N)
    bias, col_ok = load_bias(BIAS, first_col, col, cols_left, HAS_BIAS)
    top = tl.load(TOP + first_row + row, mask=row_ok, other=0.0)
    share = tl.load(SHARE + first_row + row, mask=row_ok, other=0.0)
    top = tl.where(share != 0.0, top, float("inf"))  # its exponentials are 0
    if HAS_IDS or GUIDED:
        v, is_positive, kept = values(
            raw, target_at, X_IDS, Y_IDS, SCALES, bias, col_ok, first_row, first_col, row, col, row_ok, cols_left,
            HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS,
        )  # fmt: skip
        g = share[:, None] * tl.exp2((v - top[:, None]) * unit)
        if HAS_ALL:
            g -= tl.load(ALL + first_row + row, mask=row_ok, other=0.0)[:, None]
        target = tl.load(TARGETS + first_row + row, mask=row_ok, other=0.0)
        g = tl.where(is_positive, g - target[:, None], g)
        g = tl.where(kept, g, 0.0)
        s = tl.where(kept, raw, 0.0)
    else:
        v = raw
        if LOGITS:
            scale, _, of_others = load_scales(SCALES)
            v = raw * of_others + bias[None, :]
        has_target = tl.max(target_at, axis=0) >= 0
        if LOGITS:  # noqa: SIM102 (the compiler decides this one, the program the other)
            if has_target:
                v = tl.where(col[None, :] == target_at[:, None], raw * scale + bias[None, :], v)
        g = share[:, None] * tl.exp2((v - top[:, None]) * unit)
        if HAS_ALL:
            g -= tl.load(ALL + first_row + row, mask=row_ok, other=0.0)[:, None]
        if has_target:
            target = tl.load(TARGETS + first_row + row, mask=row_ok, other=0.0)
            g = tl.where(col[None, :] == target_at[:, None], g - target[:, None], g)
        s = raw
        if HAS_BIAS or is_edge:
            g = tl.where(col_ok[None, :], g, 0.0)
            s = tl.where(col_ok[None, :], s, 0.0)
    row_g_s = tl.sum(g * s, axis=1)
    if WITH_COLS:
        tl.store(COL_PARTIALS + block_m.to(tl.int64) * n + first_col + col, tl.sum(g, axis=0), mask=col < cols_left)
    if WITH_GRAD:
        store_gradient(
            GRAD, g, first_row, first_col, row_ok, cols_left, is_edge, stride_gm,
            DESCRIPTORS, FP16_GRADIENT_SCALE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return row_g_s


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICES)
def _row_softmax_grad_kernel(
    X,  # [m, D]; this, Y and GRAD perhaps as descriptors, see operands; so are the guide's features
    Y,  # [n, D]
    GRAD,  # [m, n], or None without WITH_GRAD
    PARTIALS,  # [cdiv(n, BLOCK_N), m] fp32
    COL_PARTIALS,  # [cdiv(m, BLOCK_M), n] fp32, or None without WITH_COLS
    TOP,  # this and what follows: [m] fp32
    SHARE,
    TARGETS,
    ALL,  # or None without HAS_ALL
    GUIDE_X,  # [m, E], or None without GUIDED, and so on
    GUIDE_Y,  # [n, E]
    THRESHOLD,  # [m]
    SCALES,  # [3]
    TARGET,  # [m] int64
    X_IDS,  # [m] int64
    Y_IDS,  # [n]
    BIAS,  # [n]
    m: tl.int64,
    n: tl.int64,
    D,
    E,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_am,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_gm,
    HAS_IDS: tl.constexpr,
    SAME_ID: tl.constexpr,
    GUIDED: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALL: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WITH_COLS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GUIDE_DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):
    block_m, block_n = locate_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = block_m.to(tl.int64) * BLOCK_M
    first_col = block_n.to(tl.int64) * BLOCK_N
    raw = guided_similarities(
        X, Y, GUIDE_X, GUIDE_Y, THRESHOLD, TARGET, X_IDS, Y_IDS, m, n, D, E, first_row, first_col, stride_xm,
        stride_xd, stride_yn, stride_yd, stride_am, stride_ad, stride_bn, stride_bd,
        HAS_IDS, SAME_ID, GUIDED, EVEN_D, EVEN_E, DESCRIPTORS, GUIDE_DESCRIPTORS, INPUT_PRECISION, GUIDE_PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    unit = load_unit(SCALES, LOGITS)
    if HALVES:
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = split_columns(raw, BLOCK_M, BLOCK_N)
        row_g_s = _grad_epilogue(
            left, GRAD, COL_PARTIALS, TARGET, X_IDS, Y_IDS, SCALES, BIAS, TOP, SHARE, TARGETS, ALL, unit, m, n, block_m,
            first_row, first_col, stride_gm, HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS, HAS_ALL, WITH_GRAD, WITH_COLS,
            DESCRIPTORS, BLOCK_M, WIDTH,
        )  # fmt: skip
        row_g_s += _grad_epilogue(
            right, GRAD, COL_PARTIALS, TARGET, X_IDS, Y_IDS, SCALES, BIAS, TOP, SHARE, TARGETS, ALL, unit, m, n,
            block_m, first_row, first_col + WIDTH, stride_gm, HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS, HAS_ALL,
            WITH_GRAD, WITH_COLS, DESCRIPTORS, BLOCK_M, WIDTH,
        )  # fmt: skip
    else:
        row_g_s = _grad_epilogue(
            raw, GRAD, COL_PARTIALS, TARGET, X_IDS, Y_IDS, SCALES, BIAS, TOP, SHARE, TARGETS, ALL, unit, m, n, block_m,
            first_row, first_col, stride_gm, HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS, HAS_ALL, WITH_GRAD, WITH_COLS,
            DESCRIPTORS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    tl.store(PARTIALS + block_n.to(tl.int64) * m + row, row_g_s, mask=row < m)


def row_softmax_grad(
    x: Tensor,
    y: Tensor,
    grad: Tensor | None,
    moments: Tensor,
    col_sums: Tensor | None,
    pairs: Pairs,
    top: Tensor,
    share: Tensor,
    targets: Tensor,
    every: Tensor | None,
    *,
    config: Config | None = None,
) -> None:
    """Write the gradient tile G of one panel to ``grad``, and add its sums.

    Args:
        x, y, pairs, config: as for ``row_softmax_stats``.
        grad: [m, n] in the dtype of x with unit stride along n, receives G times the gradient scale; None where no
            feature gradient is wanted.
        moments: [m] float64, to which the row sums of G s are added.
        col_sums: [n] float64, to which the column sums of G are added, or None.
        top: [m] fp32, contiguous, as are all that follow: a maximum of v in each row, at least its own.
        share: [m], of exp(unit (v - top)): the weight of the row over the sum of these exponentials. At 0 the row takes
            no part in them.
        targets: [m], subtracted from positive pairs.
        every: [m], subtracted from every kept pair; or None.
    """
    m, n = x.shape[0], y.shape[0]

    def launch(config: Config) -> tuple[Tensor, Tensor | None]:
        """Row sums by column block, and column sums by row block."""
        config = suited(fitted(config, x, pairs, every is not None, col_sums is not None), x, y, grad)
        rows, columns = cdiv(m, config.block_m), cdiv(n, config.block_n)
        partials = torch.empty(columns, m, dtype=torch.float32, device=x.device)
        by_column = None
        if col_sums is not None:
            by_column = torch.empty(rows, n, dtype=torch.float32, device=x.device)
        wanted = every is not None, grad is not None, by_column is not None
        with on_device(x.device):
            _row_softmax_grad_kernel[(rows * columns,)](
                *operands(config, x, y, grad),
                partials,
                by_column,
                top,
                share,
                targets,
                every,
                **launch_arguments(config, x, y, pairs),
                stride_gm=0 if grad is None else grad.stride(0),
                **kernel_constants(pair_constants(config, x, pairs), *wanted),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        return partials, by_column

    config = config or chosen_config("row_softmax_grad", x, y, grad, pairs, launch)
    partials, by_column = launch(config)
    moments += partials.sum(dim=0, dtype=torch.float64)
    if col_sums is not None and by_column is not None:
        col_sums += by_column.sum(dim=0, dtype=torch.float64)


def kernel_constants(shared: dict[str, Any], has_all: bool, with_grad: bool, with_cols: bool) -> dict[str, Any]:
    """What is not wanted is not compiled in."""
    return {**shared, "HAS_ALL": has_all, "WITH_GRAD": with_grad, "WITH_COLS": with_cols}
