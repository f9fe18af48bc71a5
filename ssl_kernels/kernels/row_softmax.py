r"""The softmax over rows on tiles: what its two kernels share, and how they are launched.

For panels x [m, D] and y [n, D], with s_ij = x_i . y_j in an fp32 accumulator,

    z_ij = t_ij s_ij + bias_j,    t_ij one of three scales: of positives, of other pairs of equal ids, of all others

A first visit to the tiles (row_softmax_stats.py) merges into running statistics of each row, over the pairs that are
kept, the maximum of v, the sum of exp(unit (v - maximum)), the sum of v over positives and their number; and for label
smoothing the sum of v and the number of pairs. v is s and the unit the scale if the three scales are one and there is
no bias; else v is z and the unit 1. A second visit (row_softmax_grad.py) writes

    G_ij = share_i exp(unit (v_ij - top_i)) - [ij positive] target_i - all_i

and zero for pairs that are left out. Softmax has rows alone here: one exponential per element and visit, against the
row's own maximum. A row's target is looked for pair by pair only in blocks that hold one.

With a guide, scores of other features are formed first, and what is above the threshold of its row is where the
accumulator of the similarities starts at -2e38 instead of 0: no mask is held through the product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.configs import HAS_OLD_TRITON, Config, choose_config, device_traits, narrowed, product_kind
from ssl_kernels.kernels.softmax import config_for
from ssl_kernels.kernels.tiles import have_same_id, operands, similarities, suited, tile_constants

__all__ = ["Guide", "Pairs"]

LOG2_E = tl.constexpr(1.4426950408889634)
_LEFT_OUT = tl.constexpr(-2e38)
_LEAST = tl.constexpr(-1e38)  # what is below is left out
_LEAST_SCALE = tl.constexpr(2.0**-126)
# Addresses that slices of a batch make anything, and sizes that change from panel to panel: nothing is compiled anew.
SIZES = ["m", "n"]
SLICES = ["TARGET", "X_IDS", "Y_IDS", "BIAS", "THRESHOLD", "TOP", "SHARE", "TARGETS", "ALL"]


class Guide(NamedTuple):
    x: Tensor  # [m, E]
    y: Tensor  # [n, E]
    threshold: Tensor  # [m] fp32


class Pairs(NamedTuple):
    """What there is to know of the pairs of a panel; vectors are contiguous."""

    target: Tensor  # [m] int64: the column of each row's target; out of range for none
    x_ids: Tensor | None  # [m] int64
    y_ids: Tensor | None  # [n]
    same_id: int  # pairs of equal ids off the target: 0 are left out, 1 are positive, 2 are negatives
    scales: Tensor  # [3] fp32: of positives, of other pairs of equal ids, of all others; at least 0
    bias: Tensor | None  # [n] fp32
    logits: bool  # whether there is a bias, or the scales differ
    guide: Guide | None

    def unit(self) -> Tensor:
        """What v is multiplied by."""
        return torch.ones_like(self.scales[0]) if self.logits else self.scales[0]


@triton.jit
def load_unit(SCALES, LOGITS: tl.constexpr):
    """What v is multiplied by, in base 2. A scale of 0 would make NaN of the -inf of a pair that is left out; of a
    negative one NaN is made."""
    if LOGITS:
        return LOG2_E
    scale = tl.load(SCALES)
    scale = tl.where(scale < 0.0, float("nan"), scale)
    return tl.where(scale == 0.0, _LEAST_SCALE, scale) * LOG2_E


@triton.jit
def guided_similarities(
    X, Y, GUIDE_X, GUIDE_Y, THRESHOLD, TARGET, X_IDS, Y_IDS, m, n, D, E, first_row, first_col, stride_xm, stride_xd,
    stride_yn, stride_yd, stride_am, stride_ad, stride_bn, stride_bd,
    HAS_IDS: tl.constexpr,
    SAME_ID: tl.constexpr,
    GUIDED: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GUIDE_DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x_i . y_j of a tile, far below -1e38 where the guide leaves a pair out."""
    start = None
    if GUIDED:
        scores = similarities(
            GUIDE_X, GUIDE_Y, m, n, E, first_row, first_col, stride_am, stride_ad, stride_bn, stride_bd,
            EVEN_E, GUIDE_DESCRIPTORS, GUIDE_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        row = tl.arange(0, BLOCK_M)
        col = tl.arange(0, BLOCK_N)
        row_ok = first_row + row < m
        threshold = tl.load(THRESHOLD + first_row + row, mask=row_ok, other=float("inf"))
        spared = col[None, :] == target_in_block(TARGET, first_row, first_col, row, row_ok, BLOCK_N)[:, None]
        if HAS_IDS and SAME_ID == 1:
            spared = spared | have_same_id(X_IDS, Y_IDS, first_row, first_col, row, col, row_ok, n - first_col)
        start = tl.where((scores > threshold[:, None]) & (spared == 0), _LEFT_OUT, 0.0)
    return similarities(
        X, Y, m, n, D, first_row, first_col, stride_xm, stride_xd, stride_yn, stride_yd,
        EVEN_D, DESCRIPTORS, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, start,
    )  # fmt: skip


@triton.jit
def target_in_block(TARGET, first_row, first_col, row, row_ok, BLOCK_N: tl.constexpr):
    """The column of each row's target, counted within the block; -1 where it is in another."""
    at = tl.load(TARGET + first_row + row, mask=row_ok, other=-1) - first_col
    return tl.where((at >= 0) & (at < BLOCK_N), at, -1).to(tl.int32)


@triton.jit
def values(
    raw, target_at, X_IDS, Y_IDS, SCALES, bias, col_ok, first_row, first_col, row, col, row_ok, cols_left,
    HAS_IDS: tl.constexpr,
    SAME_ID: tl.constexpr,
    GUIDED: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """v of a block [BLOCK_M, BLOCK_N], which pairs are positive, and which are kept: pair by pair."""
    is_target = col[None, :] == target_at[:, None]
    is_positive = is_target
    kept = is_target | col_ok[None, :]  # of the shape of the tile
    kept = kept & col_ok[None, :]
    same = is_target
    if HAS_IDS:
        same = have_same_id(X_IDS, Y_IDS, first_row, first_col, row, col, row_ok, cols_left)
        if SAME_ID == 0:
            kept = kept & (is_target | (same == 0))
        if SAME_ID == 1:
            is_positive = is_target | same
    if GUIDED:
        kept = kept & ((raw >= _LEAST) | (raw == float("-inf")) | (raw != raw))  # so do infinity and NaN
    is_positive = is_positive & kept
    v = raw
    if LOGITS:
        scale, of_same, of_others = load_scales(SCALES)
        if HAS_IDS:
            v = raw * tl.where(is_positive, scale, tl.where(same, of_same, of_others))
        else:
            v = raw * tl.where(is_positive, scale, of_others)
        if HAS_BIAS:
            v += bias[None, :]
    return v, is_positive, kept


@triton.jit
def load_scales(SCALES):
    """Of positives, of other pairs of equal ids, of all others; NaN if the first is negative."""
    scale = tl.load(SCALES)
    bad = tl.where(scale < 0.0, float("nan"), 0.0)
    return scale + bad, tl.load(SCALES + 1) + bad, tl.load(SCALES + 2) + bad


@triton.jit
def load_bias(BIAS, first_col, col, cols_left, HAS_BIAS: tl.constexpr):
    """The bias of a block's columns, and which of them count; -inf removes one."""
    col_ok = col < cols_left
    bias = tl.zeros_like(col).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + first_col + col, mask=col_ok, other=float("-inf"))
        col_ok = col_ok & (bias != float("-inf"))
    return bias, col_ok


def chosen_config(
    kernel: str, x: Tensor, y: Tensor, grad: Tensor | None, pairs: Pairs, launch: Callable[[Config], Any]
) -> Config:
    """The configuration of a launch. Where a guide's features are wider than x, they decide what fits."""
    masked = pairs.x_ids is not None or pairs.guide is not None
    wide = (x, y)
    if pairs.guide is not None and product_kind(x) == "half" != product_kind(pairs.guide.x):
        wide = (pairs.guide.x, pairs.guide.y)
    return choose_config(kernel, *wide, grad, launch, has_ids=masked)


def fitted(config: Config, x: Tensor, pairs: Pairs, smoothed: bool, sums_columns: bool = False) -> Config:
    """The configuration where registers are scarce, as they are with masks of pairs."""
    has_ids, guided = pairs.x_ids is not None, pairs.guide is not None
    family = device_traits(x.device)[0]
    return fitted_for(config, family, has_ids, guided, smoothed, pairs.bias is not None, sums_columns)


def fitted_for(
    config: Config, family: str, has_ids: bool, guided: bool, smoothed: bool, has_bias: bool, sums_columns: bool
) -> Config:
    """A bias is one more vector of columns, as label smoothing has them for CLIP. Of halves whose columns are added up
    sm_100 would make each exponential twice, for rows and for columns."""
    fitted = config_for(config, family, has_ids or guided, smoothed or (has_bias and family == "sm_100"))
    if HAS_OLD_TRITON and guided and family == "sm_80":
        fitted = replace(fitted, block_d=min(fitted.block_d, 32))
    if HAS_OLD_TRITON and has_bias:
        return narrowed(fitted, 32)
    if has_ids and guided and family == "sm_100":
        return replace(narrowed(fitted, 16), block_d=max(fitted.block_d, 32))
    return replace(fitted, halves=False) if sums_columns and family == "sm_100" else fitted


def pair_constants(config: Config, x: Tensor, pairs: Pairs) -> dict[str, Any]:
    """The compile-time arguments that both kernels have."""
    width, kind, descriptors = 0, "half", False
    if pairs.guide is not None:
        width, kind = pairs.guide.x.shape[1], product_kind(pairs.guide.x)
        descriptors = suited(config, pairs.guide.x, pairs.guide.y).descriptors
    return constants(
        config, product_kind(x), x.shape[1], pairs.x_ids is not None, pairs.same_id, pairs.logits,
        pairs.bias is not None, pairs.guide is not None, width, kind, descriptors,
    )  # fmt: skip


def constants(
    config: Config, kind: str, width: int, has_ids: bool, same_id: int, logits: bool, has_bias: bool, guided: bool,
    guide_width: int = 0, guide_kind: str = "half", guide_descriptors: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        **tile_constants(config, kind, width),
        "HALVES": config.halves,
        "HAS_IDS": has_ids,
        "SAME_ID": same_id if has_ids else 0,
        "LOGITS": logits,
        "HAS_BIAS": has_bias,
        "GUIDED": guided,
        "EVEN_E": guide_width % config.block_d == 0,
        "GUIDE_DESCRIPTORS": guide_descriptors,
        "GUIDE_PRECISION": "tf32" if guide_kind == "tf32" else "ieee",
    }


def launch_arguments(config: Config, x: Tensor, y: Tensor, pairs: Pairs) -> dict[str, Any]:
    """The run-time arguments that both kernels have, but for features and gradient."""
    guide_x, guide_y, threshold, width = None, None, None, 0
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if pairs.guide is not None:
        of_guide = suited(config, pairs.guide.x, pairs.guide.y)
        guide_x, guide_y, _ = operands(of_guide, pairs.guide.x, pairs.guide.y, None)
        threshold, width = pairs.guide.threshold, pairs.guide.x.shape[1]
        strides = (*pairs.guide.x.stride(), *pairs.guide.y.stride())
    names = ("stride_xm", "stride_xd", "stride_yn", "stride_yd", "stride_am", "stride_ad", "stride_bn", "stride_bd")
    return {
        "GUIDE_X": guide_x,
        "GUIDE_Y": guide_y,
        "THRESHOLD": threshold,
        "SCALES": pairs.scales,
        "TARGET": pairs.target,
        "X_IDS": pairs.x_ids,
        "Y_IDS": pairs.y_ids,
        "BIAS": pairs.bias,
        "m": x.shape[0],
        "n": y.shape[0],
        "D": x.shape[1],
        "E": width,
        **dict(zip(names, (*x.stride(), *y.stride(), *strides), strict=True)),
    }
