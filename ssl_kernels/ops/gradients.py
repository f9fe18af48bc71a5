"""The last step of every contrastive loss's backward: factors and casts that wait for the upstream gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "ssl_kernels::finish_gradients",
    mutates_args=(),
    schema=(
        "(Tensor upstream, Tensor scale, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias, ScalarType dtype) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def finish_gradients(
    upstream: Tensor, scale: Tensor, dx: Tensor, dy: Tensor, dscale: Tensor, dbias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """upstream * scale * (dx, dy), cast to ``dtype`` after the product, and upstream * (dscale, dbias).

    An op of its own, so that differentiating a gradient again meets the error below instead of a wrong result.
    """
    factor = upstream * scale
    gx = torch.empty(dx.shape, dtype=dtype, device=dx.device)
    gy = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    torch.mul(dx, factor, out=gx)
    torch.mul(dy, factor, out=gy)
    return gx, gy, dscale * upstream, dbias * upstream


@finish_gradients.register_fake
def _(
    upstream: Tensor, scale: Tensor, dx: Tensor, dy: Tensor, dscale: Tensor, dbias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dx.new_empty(dx.shape, dtype=dtype),
        dy.new_empty(dy.shape, dtype=dtype),
        torch.empty_like(dscale),
        torch.empty_like(dbias),
    )


def no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "ssl_kernels: the gradient of a fused loss cannot be differentiated again; "
        "for double backward run the loss inside `with ssl_kernels.use_backend('reference'):`"
    )


finish_gradients.register_autograd(no_double_backward)
