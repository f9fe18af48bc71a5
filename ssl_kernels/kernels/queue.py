r"""Triton kernel of the key queue: write a batch of keys over the oldest ones.

    queue[(pointer + r) mod K] <- key_r        pointer <- (pointer + B) mod K

for keys [B, D], of which only the last K are written where B > K, so that no row is written twice. Keys are converted
to the dtype of the queue, after a division by max(||key||, 1e-12) in fp32 if they are to be normalised. The pointer
stays on the device: the kernel reads it, and what moves it on is launched behind on the same stream, so that the host
never waits and no program sees the new value.

Budget: B rows read and B rows written; the queue is not cloned, nor shifted. To be normalised, a row is read twice, the
second time from cache. Compiled for sm_90 and followed through the code, not timed: 21 instructions per element of
aligned fp32 rows of 256 that are normalised, 111 where rows are not aligned.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (the parameters of jitted functions are Triton's, not Python's; every other function here is annotated)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssl_kernels.kernels.tiles import cdiv, on_device

_LEAST_NORM = tl.constexpr(1e-12)
_BLOCK_ELEMENTS = 2048
_WIDEST_BLOCK = 1024


# Batches and queues differ in size: specialising on either would recompile.
@triton.jit(do_not_specialize=["B", "K", "skipped"], do_not_specialize_on_alignment=["POINTER"])
def _enqueue_kernel(
    QUEUE,  # [K, D]
    POINTER,  # int64, one element
    KEYS,  # [B, D]
    B: tl.int64,
    K: tl.int64,
    D,
    skipped: tl.int64,  # keys that later ones would overwrite
    stride_qk,
    stride_qd,
    stride_kb,
    stride_kd,
    NORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    key = skipped + tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    key_ok = key < B
    depth = tl.arange(0, BLOCK_D)
    row = (tl.load(POINTER) + key) % K
    row = tl.where(row < 0, row + K, row)  # a negative pointer must not lead out of the queue

    if NORMALIZE:
        square = tl.zeros((BLOCK_B,), tl.float32)
        for d in range(0, D, BLOCK_D):
            at = (d + depth)[None, :].to(tl.int64)
            ok = key_ok[:, None] & (at < D)
            x = tl.load(KEYS + key[:, None] * stride_kb + at * stride_kd, mask=ok, other=0.0).to(tl.float32)
            square += tl.sum(x * x, axis=1)
        norm = tl.sqrt(square)
        norm = tl.where(norm < _LEAST_NORM, _LEAST_NORM, norm)  # a maximum would lose NaN
    for d in range(0, D, BLOCK_D):
        at = (d + depth)[None, :].to(tl.int64)
        ok = key_ok[:, None] & (at < D)
        x = tl.load(KEYS + key[:, None] * stride_kb + at * stride_kd, mask=ok, other=0.0)
        if NORMALIZE:
            x = x.to(tl.float32) / norm[:, None]
        tl.store(QUEUE + row[:, None] * stride_qk + at * stride_qd, x.to(QUEUE.dtype.element_ty), mask=ok)


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    """Write keys from row ``pointer`` of the queue on, around its end, and move the pointer on.

    Args:
        queue: [K, D] in fp32, bf16 or fp16, any strides that keep its elements apart; K and D at least 1.
        pointer: int64 of one element, on the device.
        keys: [B, D] in any of these dtypes, any strides, in memory apart from ``queue``.
        normalize: whether to divide each key by its Euclidean norm first.
    """
    (capacity, width), batch = queue.shape, keys.shape[0]
    if batch == 0:
        return
    block_d = min(triton.next_power_of_2(width), _WIDEST_BLOCK)
    block_b = max(1, _BLOCK_ELEMENTS // (2 * block_d))
    skipped = max(0, batch - capacity)
    with on_device(queue.device):
        _enqueue_kernel[(cdiv(batch - skipped, block_b),)](
            queue, pointer, keys, batch, capacity, width, skipped, *queue.stride(), *keys.stride(),
            NORMALIZE=normalize, BLOCK_B=block_b, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    pointer.add_(batch).remainder_(capacity)
