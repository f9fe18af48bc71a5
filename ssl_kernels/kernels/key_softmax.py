r"""Triton kernels of the softmax over frozen keys: log-sum-exp and weighted mean of a queue, in one pass over it.

For queries q [M, D], keys k [K, D] that take no gradient, and scale t,

    z_ij = t q_i . k_j        lse_i = log sum_j exp(z_ij)        mean_i = sum_j exp(z_ij - lse_i) k_j

The mean is d lse_i / d (t q_i), so forward and backward of InfoNCE against the queue need nothing else. This is
attention with the keys for values. With u = q . k, or -q . k where t is negative, and s = |t| log2(e), s u is z in base
2. Running along its share of the keys, a program keeps for each query the maximum m of u so far, the sum l of
2^(s (u - m)) and the weighted keys a; with m' = max(m, max_j u_j) of the next block,

    l <- l 2^(s (m - m')) + sum_j 2^(s (u_j - m'))        a <- a 2^(s (m - m')) + sum_j 2^(s (u_j - m')) k_j

so there is no scale at which a sum underflows. The difference comes before the product: s u_j less a rounded s m', as
one fma, would leave the rounding, which is all that counts where z is large. As there are far more keys than queries,
keys are split over programs until the chip is full; a second, small launch merges their (m, l, a) in a fixed order: the
result is bitwise reproducible on the same chip.

Products take operands in the dtype of the queries, to which keys are converted as they are read; the exponentials are
rounded to 16 bits for the second product only where queries have 16 bits, and l is summed before.

Budget, in units of 2 M K D FLOP: 2 for D up to 256, as one program then accumulates the whole mean, one for each
further 256. Where D is at most 128 a key is also read but once, for both products. The rest per element of M x K is
about 7 instructions (selection, maximum, subtraction, multiplication, ex2, addition, conversion) and, in global memory,
D / block_m elements of keys, most of which come from L2, as the programs of the same keys are neighbours. Compiled for
sm_90 and followed through the code, not timed: 20 instructions per element of M x K in bf16 for D = 128, addresses and
both products included. No similarity is written to memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.configs import HAS_OLD_TRITON, device_traits, is_aligned, measured, product_kind
from ssl_kernels.kernels.tiles import cdiv, finite_from_below, on_device

__all__ = ["CONFIGS", "Config", "key_softmax"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_SCALE = tl.constexpr(2.0**-126)
_WIDEST_WHOLE = 128
_PROGRAMS_PER_MULTIPROCESSOR = 2
_MERGE_SPLITS = 16
_MERGE_COLUMNS = 128


@dataclass(frozen=True)
class Config:
    """How one program of the kernel is cut."""

    block_m: int
    block_n: int  # keys of one step
    block_d: int | None  # depth of one step of the similarities; None: all of it, in a tile that serves both products
    block_e: int  # columns of the mean, at most
    num_warps: int
    num_stages: int


# By chip family and by kind of product: for at most 128 features whose rows are aligned, for more of these, and for
# rows that are not aligned, whose addresses take registers.
CONFIGS: dict[tuple[str, str], tuple[Config, Config, Config]] = {
    ("sm_80", "half"): (Config(128, 64, None, 128, 8, 2), Config(64, 64, 64, 256, 8, 2), Config(64, 32, 32, 128, 8, 2)),
    ("sm_80", "tf32"): (Config(64, 32, None, 128, 4, 2), Config(64, 32, 32, 256, 8, 2), Config(64, 32, 32, 128, 8, 2)),
    ("sm_80", "ieee"): (Config(64, 32, 16, 256, 8, 2), Config(64, 32, 16, 256, 8, 2), Config(64, 32, 16, 64, 8, 2)),
    ("sm_90", "half"): (Config(128, 64, None, 128, 8, 3), Config(64, 64, 64, 256, 8, 3), Config(64, 32, 32, 128, 8, 2)),
    ("sm_90", "tf32"): (Config(64, 32, None, 128, 4, 3), Config(64, 32, 32, 256, 8, 3), Config(64, 32, 32, 128, 8, 2)),
    ("sm_90", "ieee"): (Config(64, 32, 16, 256, 8, 2), Config(64, 32, 16, 256, 8, 2), Config(64, 32, 16, 64, 8, 2)),
    ("sm_100", "half"): (
        Config(128, 64, None, 128, 8, 3),
        Config(64, 64, 64, 256, 8, 3),
        Config(64, 32, 32, 128, 8, 2),
    ),
    ("sm_100", "tf32"): (Config(64, 32, None, 128, 4, 3), Config(64, 32, 32, 256, 8, 3), Config(64, 32, 32, 128, 8, 2)),
    ("sm_100", "ieee"): (Config(64, 32, 16, 256, 8, 2), Config(64, 32, 16, 256, 8, 2), Config(64, 32, 16, 64, 8, 2)),
    ("gfx9", "half"): (Config(128, 64, None, 128, 8, 1), Config(64, 64, 64, 256, 8, 1), Config(64, 32, 32, 128, 4, 1)),
    ("gfx9", "tf32"): (Config(64, 32, None, 128, 4, 1), Config(64, 32, 32, 256, 4, 1), Config(64, 32, 32, 128, 4, 1)),
    ("gfx9", "ieee"): (Config(64, 32, 16, 256, 4, 1), Config(64, 32, 16, 256, 4, 1), Config(64, 32, 16, 128, 4, 1)),
}


@triton.jit
def _load_scale(SCALE):
    """Its magnitude, and whether it is negative. 0 is replaced: it would make NaN of the -inf of a missing key."""
    scale = tl.load(SCALE)
    is_negative = scale < 0.0
    return tl.where(scale == 0.0, _LEAST_SCALE, tl.where(is_negative, -scale, scale)), is_negative


# The number of keys grows while a queue fills, and batches differ: specialising on either would recompile.
@triton.jit(do_not_specialize=["M", "K", "span"])
def _key_softmax_kernel(
    QUERY,  # [M, D]
    KEYS,  # [K, D]
    MAXIMA,  # [splits, M] fp32
    SUMS,  # [splits, M] fp32
    MEANS,  # [splits, M, D] fp32, not yet divided by the sums; or None without WANT_MEAN
    SCALE,
    M: tl.int64,
    K: tl.int64,
    D,
    span: tl.int64,  # keys of one split, a multiple of BLOCK_N
    stride_qm,
    stride_qd,
    stride_kn,
    stride_kd,
    WANT_MEAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Neighbouring programs read the same keys.
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    first_e = tl.program_id(2) * BLOCK_E
    first_key = split * span
    keys_left = tl.minimum(K - first_key, span)
    row_ok = row < M
    depth = tl.arange(0, BLOCK_D)
    e = first_e + tl.arange(0, BLOCK_E)
    scale, is_negative = _load_scale(SCALE)
    scale *= _LOG2_E

    q_at = QUERY + row[:, None] * stride_qm + depth[None, :].to(tl.int64) * stride_qd
    if WHOLE:
        q_ok = row_ok[:, None] if EVEN_D else row_ok[:, None] & (depth < D)[None, :]
        q = tl.load(q_at, mask=q_ok, other=0.0)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for step in range(tl.cdiv(keys_left, BLOCK_N).to(tl.int32)):
        key = step * BLOCK_N + tl.arange(0, BLOCK_N)  # within the split
        key_ok = key < keys_left
        key_at = KEYS + (first_key + key)[:, None] * stride_kn
        if WHOLE:
            k_ok = key_ok[:, None] if EVEN_D else key_ok[:, None] & (depth < D)[None, :]
            k = tl.load(key_at + depth[None, :].to(tl.int64) * stride_kd, mask=k_ok, other=0.0)
            k = k.to(QUERY.dtype.element_ty)
            raw = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
        else:
            raw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for d in range(0, D, BLOCK_D):
                d_ok = depth < D - d
                at = (d + depth)[None, :].to(tl.int64)
                q_ok = row_ok[:, None] if EVEN_D else row_ok[:, None] & d_ok[None, :]
                k_ok = key_ok[:, None] if EVEN_D else key_ok[:, None] & d_ok[None, :]
                q = tl.load(QUERY + row[:, None] * stride_qm + at * stride_qd, mask=q_ok, other=0.0)
                k = tl.load(key_at + at * stride_kd, mask=k_ok, other=0.0).to(QUERY.dtype.element_ty)
                raw = tl.dot(q, tl.trans(k), raw, input_precision=INPUT_PRECISION)

        if is_negative:  # behind a branch, uniform over the program
            raw = -raw
        raw = tl.where(key_ok[None, :], raw, float("-inf"))
        larger = tl.maximum(maximum, tl.max(raw, axis=1))
        shift = finite_from_below(larger)
        fade = tl.exp2((maximum - shift) * scale)
        p = tl.exp2((raw - shift[:, None]) * scale)
        total = total * fade + tl.sum(p, axis=1)
        maximum = larger
        if WANT_MEAN:
            if not WHOLE:
                k = tl.load(
                    key_at + e[None, :].to(tl.int64) * stride_kd, mask=key_ok[:, None] & (e < D)[None, :], other=0.0
                ).to(QUERY.dtype.element_ty)
            mean = tl.dot(p.to(k.dtype), k, mean * fade[:, None], input_precision=INPUT_PRECISION)

    if tl.program_id(2) == 0:
        tl.store(MAXIMA + split * M + row, maximum, mask=row_ok)
        tl.store(SUMS + split * M + row, total, mask=row_ok)
    if WANT_MEAN:
        mean_at = MEANS + (split * M + row)[:, None] * D + e[None, :]
        tl.store(mean_at, mean, mask=row_ok[:, None] & (e < D)[None, :])


@triton.jit(do_not_specialize=["M", "splits"])
def _merge_splits_kernel(
    MAXIMA,  # [splits, M]
    SUMS,
    MEANS,  # [splits, M, D]
    LSE,  # [M]
    MEAN,  # [M, D]
    SCALE,
    M: tl.int64,
    D,
    splits,
    WANT_MEAN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One query, and BLOCK_E columns of its mean: SPLITS of the splits at a time, in their order."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    natural_scale, _ = _load_scale(SCALE)
    scale = natural_scale * _LOG2_E
    maximum = tl.full((SPLITS,), float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = split.to(tl.int64) * M + row
        maximum = tl.maximum(maximum, tl.load(MAXIMA + at, mask=split < splits, other=float("-inf")))
    largest = tl.max(maximum, axis=0)
    shift = finite_from_below(largest)
    total = tl.zeros((SPLITS,), tl.float32)
    mean = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        split_ok = split < splits
        at = split.to(tl.int64) * M + row
        weight = tl.exp2((tl.load(MAXIMA + at, mask=split_ok, other=float("-inf")) - shift) * scale)
        total += weight * tl.load(SUMS + at, mask=split_ok, other=0.0)
        if WANT_MEAN:
            part = tl.load(MEANS + at[:, None] * D + e[None, :], mask=split_ok[:, None] & (e < D)[None, :], other=0.0)
            mean += tl.sum(weight[:, None] * part, axis=0)
    sum_exp = tl.sum(total, axis=0)
    if tl.program_id(1) == 0:
        tl.store(LSE + row, shift * natural_scale + tl.log2(sum_exp) * _LN_2)
    if WANT_MEAN:
        tl.store(MEAN + row * D + e, mean / sum_exp, mask=e < D)


def converts_keys_first(family: str, kind: str) -> bool:
    """Whether keys of another dtype are converted before the kernel reads them: an older Triton multiplies in tf32 what
    it converts on sm_100."""
    return HAS_OLD_TRITON and family == "sm_100" and kind == "ieee"


def choose_config(query: Tensor, keys: Tensor, want_mean: bool, launch: Callable[[Config], Any]) -> Config:
    """The entry of CONFIGS for these queries and keys: the one that reads keys but once, where they are narrow enough
    and measurements, if they are asked for, do not say otherwise. ``launch`` runs the kernel with one, repeatably."""
    whole, deep, unaligned = CONFIGS[device_traits(query.device)[0], product_kind(query)]
    if not (is_aligned(query) and is_aligned(keys)):
        return unaligned
    if whole == deep or query.shape[1] > _WIDEST_WHOLE:
        return deep
    wants = f" on {keys.dtype}{' mean' if want_mean else ''}"
    return measured("key_softmax", query, keys, wants, (whole, deep), launch) or whole


def key_softmax(
    query: Tensor,
    keys: Tensor,
    scale: Tensor,
    want_mean: bool,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of scale (query . key) over the keys, and the mean of the keys under that softmax.

    Args:
        query: [M, D] in fp32, bf16 or fp16, any strides; D at least 1.
        keys: [K, D] in any of these dtypes, any strides; converted to the dtype of ``query`` as they are read.
        scale: 0-dim fp32 on the device, finite.
        want_mean: whether to make the mean.
        config: an entry of CONFIGS, by default the one that :func:`choose_config` names.
        splits: into how many parts the keys are cut at most, by default as many as fill the chip.

    Returns:
        lse [M] fp32, -inf where there is no key, and the mean [M, D] fp32, then zero; or None.
    """
    (m, width), k = query.shape, keys.shape[0]
    lse = torch.empty(m, dtype=torch.float32, device=query.device)
    mean = torch.empty(m, width, dtype=torch.float32, device=query.device) if want_mean else None
    if m == 0 or k == 0:
        return lse.fill_(float("-inf")), None if mean is None else mean.zero_()
    if converts_keys_first(device_traits(query.device)[0], product_kind(query)):
        keys = keys.to(query.dtype)

    def launch(config: Config) -> tuple[Tensor, Tensor, Tensor | None]:
        """Maxima, sums and sums of weighted keys, by splits of the keys."""
        constants = kernel_constants(config, product_kind(query), width, want_mean)
        blocks = cdiv(m, config.block_m)
        chunks = cdiv(width, constants["BLOCK_E"]) if want_mean else 1
        most = splits or _PROGRAMS_PER_MULTIPROCESSOR * device_traits(query.device)[2] // (blocks * chunks)
        steps = cdiv(k, config.block_n)
        span = cdiv(steps, max(1, min(most, steps))) * config.block_n
        parts = cdiv(k, span)  # none of them empty
        maxima, sums = torch.empty(2, parts, m, dtype=torch.float32, device=query.device)
        means = torch.empty(parts, m, width, dtype=torch.float32, device=query.device) if want_mean else None
        with on_device(query.device):
            _key_softmax_kernel[(blocks, parts, chunks)](
                query,
                keys,
                maxima,
                sums,
                means,
                scale,
                m,
                k,
                width,
                span,
                *query.stride(),
                *keys.stride(),
                **constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        return maxima, sums, means

    maxima, sums, means = launch(config or choose_config(query, keys, want_mean, launch))
    with on_device(query.device):
        _merge_splits_kernel[(m, cdiv(width, _MERGE_COLUMNS) if want_mean else 1)](
            maxima, sums, means, lse, mean, scale, m, width, len(maxima),
            WANT_MEAN=want_mean, SPLITS=_MERGE_SPLITS, BLOCK_E=_MERGE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return lse, mean


def kernel_constants(config: Config, kind: str, width: int, want_mean: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    whole = config.block_d is None
    padded = max(16, triton.next_power_of_2(width))
    block_d = padded if config.block_d is None else config.block_d
    return {
        "WANT_MEAN": want_mean,
        "WHOLE": whole,
        "EVEN_D": width % block_d == 0,
        "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "BLOCK_E": min(padded, config.block_e),
    }
