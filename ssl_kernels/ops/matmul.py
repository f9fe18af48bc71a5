"""Matrix products of the panel driver.

On x86-64 processors that are not Intel's, torch's fp32 products go to MKL, which takes its AVX2 path there; oneDNN,
which ships in the same torch, uses AVX-512 where the processor has it. On a Zen 5 it is 2.2 times as fast. The choice
depends on the processor alone, so that a run repeats exactly on the same machine.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ssl_kernels import _C


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 CPU products are better sent to oneDNN than through ``torch.mm``."""
    return (
        _C.cpu_vendor() not in ("intel", "unknown")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


_ONEDNN_FROM = 2**22  # multiply-adds; below, MKL's leaner calls and its choice of fewer threads win


def onednn_is_faster_for(multiply_adds: int) -> bool:
    """Whether an fp32 product of this size is."""
    return multiply_adds >= _ONEDNN_FROM and onednn_is_faster()


def _through_onednn(a: Tensor, b: Tensor) -> bool:
    on_cpu = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return on_cpu and onednn_is_faster_for(a.shape[0] * a.shape[1] * b.shape[1])


def matmul(a: Tensor, b: Tensor, memory: Tensor | None = None) -> Tensor:
    """a b for a [m, k] and b [k, n] of one dtype, any strides: oneDNN has no fast kernel for gaps between rows, and is
    1,000 times slower with them than with a copy that has none. The product is in ``memory`` [m, n] if that is given,
    but for oneDNN's, which is always new."""
    if _through_onednn(a, b):
        a, b = (t if t.is_contiguous() or t.t().is_contiguous() else t.clone() for t in (a, b))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return product
    return a @ b if memory is None else torch.mm(a, b, out=memory)


@functools.cache
def _addmm_widens(device: torch.device, factors: torch.dtype, total: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit factors to a matrix in fp32 in one call: tried once in a process."""
    out, factor = torch.zeros(16, 16, dtype=total, device=device), torch.zeros(16, 16, dtype=factors, device=device)
    try:
        torch.addmm(out, factor, factor, out_dtype=total, out=out)
    except (TypeError, RuntimeError):  # no such argument, or no kernel for it on this device
        return False
    return True


def _add_widened(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """As add_matmul, of 16-bit factors that stay as they are."""
    if _addmm_widens(a.device, a.dtype, out.dtype):
        torch.addmm(out, a, b, beta=0 if first else 1, out_dtype=out.dtype, out=out)
        return
    product = torch.mm(a, b, out_dtype=out.dtype)
    if first:
        out.copy_(product)
    else:
        out.add_(product)


def takes_16_bits(device: torch.device, total: torch.dtype) -> bool:
    """Whether :func:`add_matmul` reads factors of 16 bits as they are. Else it converts them: whoever multiplies with
    one of them more than once had better convert it before."""
    return device.type == "cuda" and torch.version.hip is None and total == torch.float32


def add_matmul(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out = a b if ``first``, else out += a b, accumulated in the dtype of ``out``: 16-bit factors into fp32."""
    if _through_onednn(a, b):
        if first:
            out.copy_(matmul(a, b))
        else:
            out.add_(matmul(a, b))
        return
    beta = 0 if first else 1  # with 0, what ``out`` holds is not read
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.dtype == b.dtype and takes_16_bits(a.device, out.dtype):
        _add_widened(out, a, b, first)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
