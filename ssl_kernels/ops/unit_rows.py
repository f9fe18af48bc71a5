"""How every module of this library normalises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops._checks import accumulation_dtype


def unit_rows(z: Tensor) -> Tensor:
    """Rows [..., D] divided by their norms, in the accumulation dtype, and returned in that of ``z``.

    In float16 the least norm, 1e-12, is 0, and the norm of a row may exceed the largest number.
    """
    return F.normalize(z.to(accumulation_dtype(z.dtype)), dim=-1).to(z.dtype)
