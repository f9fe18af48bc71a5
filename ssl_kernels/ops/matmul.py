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


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for a [m, k] and b [k, n] of one dtype, any strides."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() and b.numel() and onednn_is_faster():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return product
    return a @ b


def add_matmul(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out = a b if ``first``, else out += a b; accumulated in the dtype of ``out``."""
    product = matmul(a.to(out.dtype), b.to(out.dtype))
    if first:
        out.copy_(product)
    else:
        out.add_(product)
