r"""Triton tile kernel of the softmax over rows, first visit: statistics of the rows (see row_softmax.py).

The partial statistics of each block of columns go to a buffer with one slot per block, which a second, small launch
merges into the running statistics in float64, in a fixed order: the result is bitwise reproducible.

Budget per element: 15 instructions, 5 of them in the loop of the product: maximum, subtraction, multiplication, ex2 and
addition. Written: 16 bytes / block_n, and 8 more for label smoothing.
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
from ssl_kernels.kernels.softmax_stats import merge_statistics
from ssl_kernels.kernels.tiles import (
    cdiv,
    finite_from_below,
    left_in_block,
    locate_tile,
    on_device,
    operands,
    split_columns,
    suited,
)

__all__ = ["row_softmax_stats"]


@triton.jit
def _stats_epilogue(
    raw,  # [BLOCK_M, BLOCK_N] fp32
    TARGET,
    X_IDS,
    Y_IDS,
    SCALES,
    BIAS,
    unit,
    m,
    n,
    first_row,
    first_col,
    HAS_IDS: tl.constexpr,
    SAME_ID: tl.constexpr,
    GUIDED: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The statistics of the rows of a block, each [BLOCK_M]."""
    row = tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    row_ok = row < left_in_block(m, first_row, BLOCK_M)
    cols_left = left_in_block(n, first_col, BLOCK_N)
    target_at = target_in_block(TARGET, first_row, first_col, row, row_ok, BLOCK_N)
    bias, col_ok = load_bias(BIAS, first_col, col, cols_left, HAS_BIAS)
    row_positive = tl.zeros((BLOCK_M,), tl.float32)
    row_positives = tl.zeros((BLOCK_M,), tl.float32)
    row_all = tl.zeros((BLOCK_M,), tl.float32)
    row_pairs = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_IDS or GUIDED:
        v, is_positive, kept = values(
            raw, target_at, X_IDS, Y_IDS, SCALES, bias, col_ok, first_row, first_col, row, col, row_ok, cols_left,
            HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS,
        )  # fmt: skip
        row_positive = tl.sum(tl.where(is_positive, v, 0.0), axis=1)
        row_positives = tl.sum(is_positive.to(tl.float32), axis=1)
        if STATS == 6:
            row_all = tl.sum(tl.where(kept, v, 0.0), axis=1)
            row_pairs = tl.sum(kept.to(tl.float32), axis=1)
        v = tl.where(kept, v, float("-inf"))
    else:
        v = raw
        if LOGITS:
            scale, _, of_others = load_scales(SCALES)
            v = raw * of_others + bias[None, :]
        if tl.max(target_at, axis=0) >= 0:
            is_positive = (col[None, :] == target_at[:, None]) & col_ok[None, :]
            if LOGITS:
                v = tl.where(is_positive, raw * scale + bias[None, :], v)
            row_positive = tl.sum(tl.where(is_positive, v, 0.0), axis=1)
            if HAS_BIAS:
                row_positives = tl.sum(is_positive.to(tl.float32), axis=1)
            else:
                row_positives = ((target_at >= 0) & (target_at < cols_left)).to(tl.float32)
        if STATS == 6:
            summed = v
            if HAS_BIAS or cols_left < BLOCK_N:
                summed = tl.where(col_ok[None, :], v, 0.0)
            row_all = tl.sum(summed, axis=1)
            row_pairs += tl.sum(col_ok.to(tl.float32), axis=0)
        if cols_left < BLOCK_N:
            v = tl.where(col_ok[None, :], v, float("-inf"))
    row_max = tl.max(v, axis=1)
    row_sum = tl.sum(tl.exp2((v - finite_from_below(row_max)[:, None]) * unit), axis=1)
    return row_max, row_sum, row_positive, row_positives, row_all, row_pairs


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICES[:5])
def _row_softmax_stats_kernel(
    X,  # [m, D]; this and Y perhaps as descriptors, see operands; so are the guide's
    Y,  # [n, D]
    PARTIALS,  # [cdiv(n, BLOCK_N), STATS, m] fp32
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
    HAS_IDS: tl.constexpr,
    SAME_ID: tl.constexpr,
    GUIDED: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATS: tl.constexpr,
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
    if HALVES:  # the left columns and then the right: half as much of the epilogue is in registers at a time
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = split_columns(raw, BLOCK_M, BLOCK_N)
        max_l, sum_l, positive_l, positives_l, all_l, pairs_l = _stats_epilogue(
            left, TARGET, X_IDS, Y_IDS, SCALES, BIAS, unit, m, n, first_row, first_col,
            HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS, STATS, BLOCK_M, WIDTH,
        )  # fmt: skip
        max_r, sum_r, positive_r, positives_r, all_r, pairs_r = _stats_epilogue(
            right, TARGET, X_IDS, Y_IDS, SCALES, BIAS, unit, m, n, first_row, first_col + WIDTH,
            HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS, STATS, BLOCK_M, WIDTH,
        )  # fmt: skip
        row_max = tl.maximum(max_l, max_r)
        shift = finite_from_below(row_max)
        row_sum = sum_l * tl.exp2((max_l - shift) * unit) + sum_r * tl.exp2((max_r - shift) * unit)
        row_positive = positive_l + positive_r
        row_positives = positives_l + positives_r
        row_all = all_l + all_r
        row_pairs = pairs_l + pairs_r
    else:
        row_max, row_sum, row_positive, row_positives, row_all, row_pairs = _stats_epilogue(
            raw, TARGET, X_IDS, Y_IDS, SCALES, BIAS, unit, m, n, first_row, first_col,
            HAS_IDS, SAME_ID, GUIDED, LOGITS, HAS_BIAS, STATS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    at = PARTIALS + block_n.to(tl.int64) * STATS * m + row
    tl.store(at, row_max, mask=row < m)
    tl.store(at + m, row_sum, mask=row < m)
    tl.store(at + 2 * m, row_positive, mask=row < m)
    tl.store(at + 3 * m, row_positives, mask=row < m)
    if STATS == 6:
        tl.store(at + 4 * m, row_all, mask=row < m)
        tl.store(at + 5 * m, row_pairs, mask=row < m)


def row_softmax_stats(x: Tensor, y: Tensor, stats: Tensor, pairs: Pairs, *, config: Config | None = None) -> None:
    """Merge one panel into the running statistics of its rows.

    Args:
        x: rows [m, D] in fp32, bf16 or fp16, any strides; m and D at least 1.
        y: columns [n, D], of the same dtype, any strides; n at least 1.
        stats: [m, 4] or [m, 6] float64, any strides; as row_softmax.py has them, -inf and zeros before the first panel.
        pairs: what else there is to know.
        config: an entry of CONFIGS, by default the one that ``choose_config`` names.
    """
    m, n, width = x.shape[0], y.shape[0], stats.shape[1]

    def launch(config: Config) -> Tensor:
        """Statistics of the rows by column block."""
        config = suited(fitted(config, x, pairs, width == 6), x, y)
        blocks = cdiv(n, config.block_n)
        partials = torch.empty(blocks, width, m, dtype=torch.float32, device=x.device)
        with on_device(x.device):
            _row_softmax_stats_kernel[(cdiv(m, config.block_m) * blocks,)](
                *operands(config, x, y, None)[:2],
                partials,
                **launch_arguments(config, x, y, pairs),
                **kernel_constants(pair_constants(config, x, pairs), width),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        return partials

    config = config or chosen_config("row_softmax_stats", x, y, None, pairs, launch)
    merge_statistics(launch(config), stats, pairs.unit())


def kernel_constants(shared: dict[str, Any], stats: int) -> dict[str, Any]:
    return {**shared, "STATS": stats}
