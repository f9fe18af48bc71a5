"""A ring buffer of keys, written in place: schema, reference, backends and fake.

One pass normalises, casts and writes B rows where the pointer stands, and moves the pointer on its device: no copy of
the queue, no synchronisation with the host, no condition on the batch size.

On NVIDIA GPUs the kernel is in CUDA C++: it moves the pointer in the launch that writes the rows, and needs no compiler
at run time, whatever dtypes and strides come; the pointer has to be in [-2^52, 2^52) there. Where it is not built, as
for ROCm, Triton's writes the rows, and two small kernels of torch move the pointer behind it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.settings import choose_backend

KERNELS = ("cpu", "triton", "cuda")


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = False) -> None:
    r"""Write keys over the oldest rows of a ring buffer, in place: row :math:`(\text{pointer} + r) \bmod K` for each r.

    Args:
        queue: [K, D], float32, bfloat16, float16 or float64, with rows that are contiguous in memory.
        pointer: int64 tensor of one element on the device of ``queue``: the row that the next key goes to. It is moved
            on by B, modulo K, without waiting for the device. On a GPU it must lie in [-2^52, 2^52).
        keys: [B, D] of any of these dtypes, any strides and any B. If there are more than K, the last K remain. They
            are cast to the dtype of ``queue``, and no gradient flows to them.
        normalize: first divide each key by its norm, in float32, as ``torch.nn.functional.normalize`` does.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.

    Enqueue after the loss. Keys that are in the queue before it are among their own negatives. Use a queue on one CUDA
    stream at a time: while a kernel runs, the pointer holds an intermediate value.

    >>> import torch, ssl_kernels.functional as K
    >>> queue, pointer = torch.zeros(4, 1), torch.tensor(3)
    >>> K.enqueue_(queue, pointer, torch.tensor([[5.0], [6.0]]))
    >>> queue.flatten().tolist(), pointer.item()
    ([6.0, 0.0, 0.0, 5.0], 1)
    """
    _check(queue, pointer, keys)
    backend = choose_backend(queue.device, torch.promote_types(queue.dtype, keys.dtype), KERNELS)
    if backend == "reference":
        with torch.no_grad():
            reference(queue, pointer, keys, normalize)
    else:
        _enqueue(queue, pointer, keys.detach(), normalize, backend)


def _check(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    _checks.check_features(queue=queue)
    _checks.check_features(keys=keys)
    if queue.requires_grad:
        raise ValueError("queue: expected a buffer without gradient, got a tensor that requires it")
    if queue.shape[0] == 0:
        raise ValueError("queue: expected at least 1 row, got 0")
    if queue.stride(1) != 1 and queue.shape[1] > 1:
        raise ValueError(f"queue: expected rows that are contiguous in memory, got strides {queue.stride()}")
    if keys.shape[1] != queue.shape[1]:
        raise ValueError(f"keys: expected {queue.shape[1]} features as queue has, got {keys.shape[1]}")
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64:
        got = pointer.dtype if isinstance(pointer, Tensor) else type(pointer).__name__
        raise TypeError(f"pointer: expected an int64 tensor, got {got}")
    if pointer.numel() != 1:
        raise ValueError(f"pointer: expected one element, got shape {tuple(pointer.shape)}")
    for name, value in (("pointer", pointer), ("keys", keys)):
        if value.device != queue.device:
            raise ValueError(f"{name}: expected the device of queue ({queue.device}), got {value.device}")


def reference(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    """The definition: rows (pointer + r) mod K, of which only the last K of a longer batch remain."""
    if normalize:
        keys = F.normalize(keys.to(_checks.accumulation_dtype(keys.dtype)), dim=1, eps=1e-12)
    size, batch = queue.shape[0], keys.shape[0]
    rows = torch.arange(max(0, batch - size), batch, device=queue.device)
    queue.index_copy_(0, (pointer.reshape(()) + rows) % size, keys[max(0, batch - size) :].to(queue.dtype, copy=True))
    pointer.copy_((pointer + batch) % size)


def _enqueue_cpu(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    keys = keys if keys.stride(1) == 1 else keys.contiguous()
    torch.ops.ssl_kernels.enqueue_rows_(queue, pointer, keys, normalize)


def _enqueue_triton(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    from ssl_kernels.kernels import queue as kernels

    kernels.enqueue(queue, pointer, keys, normalize)


def _enqueue_cuda(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    torch.ops.ssl_kernels.enqueue_cuda_(queue, pointer, keys, normalize)


_BACKENDS: dict[str, Any] = {
    "eager": reference,
    "cpu": _enqueue_cpu,
    "triton": _enqueue_triton,
    "cuda": _enqueue_cuda,
}


@torch.library.custom_op(
    "ssl_kernels::enqueue",
    mutates_args=("queue", "pointer"),
    schema="(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys, bool normalize, str backend) -> ()",
)
def _enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool, backend: str) -> None:
    if keys.untyped_storage().data_ptr() == queue.untyped_storage().data_ptr():
        keys = keys.clone()  # rows of the queue itself are all read before the first is written over
    _BACKENDS[backend](queue, pointer, keys, normalize)


@_enqueue.register_fake
def _(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool, backend: str) -> None:
    return None
