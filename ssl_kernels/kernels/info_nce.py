r"""Triton kernels of InfoNCE after the softmax over the keys: all that is O(M D).

With lse_i of z_ij = t q_i . k_j and z_i = t q_i . p_i, one launch writes of each query the loss and its derivative

    l_i = log(1 + exp(lse_i - z_i))    s_i = sigmoid(lse_i - z_i)    or, where the positive is a key, lse_i - z_i and 1

and subtracts p_i from the mean of the keys. A second is for the backward pass: with f_i = upstream_i s_i it writes

    f_i t pull_i    -f_i t q_i    f_i q_i . pull_i

the gradients of q_i and p_i, and what the gradient of t is the sum of. A program takes one query.

Budget: rows are read twice at most, the second time from cache, and written once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.tiles import on_device

__all__ = ["info_nce_gradients", "info_nce_rows"]

_WIDEST_BLOCK = 1024


@triton.jit
def _info_nce_rows_kernel(
    QUERY,  # [M, D]
    POSITIVE,  # [M, D]
    LSE,  # [M]
    SCALE,
    PULL,  # [M, D] fp32, contiguous, or None: the mean of the keys, from which the positive is subtracted
    LOSS,  # [M]
    SLOPE,  # [M], receives the derivative times ``factor``
    factor,
    D,
    stride_qm,
    stride_qd,
    stride_pm,
    stride_pd,
    POSITIVE_IS_KEY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    product = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        ok = d < D
        query = tl.load(QUERY + row * stride_qm + d * stride_qd, mask=ok, other=0.0).to(tl.float32)
        positive = tl.load(POSITIVE + row * stride_pm + d * stride_pd, mask=ok, other=0.0).to(tl.float32)
        product += query * positive
        if PULL is not None:
            at = PULL + row * D + d
            tl.store(at, tl.load(at, mask=ok, other=0.0) - positive, mask=ok)
    z = tl.load(SCALE) * tl.sum(product, axis=0)
    gap = tl.load(LSE + row) - z
    if POSITIVE_IS_KEY:
        loss = gap
        slope = 1.0 + 0.0 * factor
    else:
        e = tl.exp(-tl.abs(gap))  # at most 1
        # log(1 + e) = 2 atanh(e / (2 + e)), by its series: 1 + e would lose a small e.
        ratio = e / (2.0 + e)  # at most 1 / 3
        square = ratio * ratio
        series = tl.zeros_like(square)
        for k in tl.static_range(8):
            series = series * square + 1.0 / (15 - 2 * k)
        log_1p = 2.0 * ratio * series
        # An infinite similarity would pass for a perfect match, but for the last term.
        loss = tl.where(gap > 0.0, gap, 0.0) + log_1p + 0.0 * z
        slope = tl.where(gap > 0.0, 1.0, e) / (1.0 + e)
    tl.store(LOSS + row, loss)
    tl.store(SLOPE + row, slope * factor)


@triton.jit
def _info_nce_gradients_kernel(
    UPSTREAM,  # [M], or one number
    SLOPE,  # [M], or None, which is 1
    QUERY,  # [M, D]
    PULL,  # [M, D] fp32, contiguous, or None where neither of its gradients is wanted
    SCALE,
    BY_QUERY,  # [M, D], contiguous, as is BY_POSITIVE; each of the three may be None
    BY_POSITIVE,
    BY_SCALE,  # [M]
    D,
    stride_u,
    stride_qm,
    stride_qd,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.load(UPSTREAM + row * stride_u).to(tl.float32)
    if SLOPE is not None:
        f = f * tl.load(SLOPE + row)
    scaled = f * tl.load(SCALE)
    product = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        ok = d < D
        query = tl.load(QUERY + row * stride_qm + d * stride_qd, mask=ok, other=0.0).to(tl.float32)
        if PULL is not None:
            pull = tl.load(PULL + row * D + d, mask=ok, other=0.0)
            product += query * pull
            if BY_QUERY is not None:
                tl.store(BY_QUERY + row * D + d, (pull * scaled).to(BY_QUERY.dtype.element_ty), mask=ok)
        if BY_POSITIVE is not None:
            tl.store(BY_POSITIVE + row * D + d, (query * -scaled).to(BY_POSITIVE.dtype.element_ty), mask=ok)
    if BY_SCALE is not None:
        tl.store(BY_SCALE + row, tl.sum(product, axis=0) * f)


def _block(width: int) -> dict[str, Any]:
    return {"BLOCK_D": min(triton.next_power_of_2(width), _WIDEST_BLOCK), "num_warps": 1 if width <= 256 else 4}


def info_nce_rows(
    query: Tensor,
    positive: Tensor,
    lse: Tensor,
    scale: Tensor,
    pull: Tensor | None,
    loss: Tensor,
    slope: Tensor,
    factor: float,
    positive_is_key: bool,
) -> None:
    """Write the loss and slope of every query, and subtract positives from the mean.

    Args:
        query: [M, D] in fp32, bf16 or fp16, any strides; M and D at least 1.
        positive: [M, D] in any of these dtypes, any strides.
        lse: [M] fp32, contiguous, as are ``loss`` and ``slope`` that are written.
        scale: 0-dim fp32.
        pull: [M, D] fp32, contiguous, the mean of the keys, from which positives are subtracted; or None.
        factor: of the slopes.
        positive_is_key: whether the positive is among the keys.
    """
    m, width = query.shape
    with on_device(query.device):
        _info_nce_rows_kernel[(m,)](
            query, positive, lse, scale, pull, loss, slope, factor, width, *query.stride(), *positive.stride(),
            POSITIVE_IS_KEY=positive_is_key, **_block(width),
        )  # fmt: skip


def info_nce_gradients(
    upstream: Tensor,
    slope: Tensor | None,
    query: Tensor,
    pull: Tensor | None,
    scale: Tensor,
    by_query: Tensor | None,
    by_positive: Tensor | None,
    by_scale: Tensor | None,
) -> None:
    """Write the gradients that are given memory.

    Args:
        upstream: [M] or 0-dim, fp32.
        slope: [M] fp32, contiguous; or None, which is 1.
        query: [M, D], any strides; M and D at least 1.
        pull: [M, D] fp32, contiguous; may be None if only ``by_positive`` is given.
        scale: 0-dim fp32.
        by_query: [M, D] contiguous, as is ``by_positive``; or None.
        by_scale: [M] fp32, receives what the gradient of the scale is the sum of; or None.
    """
    m, width = query.shape
    stride = upstream.stride(0) if upstream.dim() else 0
    with on_device(query.device):
        _info_nce_gradients_kernel[(m,)](
            upstream, slope, query, pull, scale, by_query, by_positive, by_scale, width, stride, *query.stride(),
            **_block(width),
        )  # fmt: skip
