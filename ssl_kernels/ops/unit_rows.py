"""How every module of this library normalises."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.contrastive import no_double_backward
from ssl_kernels.ops.dino import unit_stride
from ssl_kernels.settings import choose_backend

KERNELS = ("cpu",)
_EPS = 1e-12  # the least norm


def unit_rows(z: Tensor) -> Tensor:
    """Rows [..., D] divided by their norms, in the accumulation dtype, and returned in that of ``z``.

    In float16 the least norm, 1e-12, is 0, and the norm of a row may exceed the largest number.
    """
    return F.normalize(z.to(_checks.accumulation_dtype(z.dtype)), dim=-1, eps=_EPS).to(z.dtype)


def fused_unit_rows(z0: Tensor, z1: Tensor | None = None, *, name: str = "z") -> Tensor:
    """The same of rows [M, D], one below the other, for losses that support no double backward, either.

    On a CPU one pass each way makes them, as fp32 that was rounded to the dtype of z: a gradient is rounded once.
    ``name`` is what an error calls the rows, of which two are checked by the caller.
    """
    if z1 is None:
        _checks.check_features(**{name: z0})
    if choose_backend(z0.device, z0.dtype, KERNELS) == "cpu":
        _checks.check_transforms(z0, *([] if z1 is None else [z1]))
        rows: Tensor = _op(Arguments(z0, z1))[0]
        return rows
    if z1 is None:
        return unit_rows(z0)
    with _checks.without_autocast(z0):  # which has no rule for fp16 beside bf16
        return torch.cat([unit_rows(z0), unit_rows(z1)])


class Arguments(NamedTuple):
    z0: Tensor
    z1: Tensor | None


def _forward(a: Arguments) -> tuple[Tensor, Tensor]:
    rows, norm = _fake(a)
    torch.ops.ssl_kernels.unit_rows_([unit_stride(z) for z in a if z is not None], _EPS, rows, norm)
    return rows, norm


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """The unit rows, and the norms that their gradient takes."""
    count = a.z0.shape[0] + (0 if a.z1 is None else a.z1.shape[0])
    new = functools.partial(a.z0.new_empty, dtype=torch.float32)
    return new(count, a.z0.shape[1]), new(count)


def _setup_context(ctx: Any, a: Arguments, output: tuple[Tensor, Tensor]) -> None:
    _, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)
    ctx.first = a.z0.shape[0]
    # torch.library counts an argument of its own at the end.
    wanted = (z if needed else None for z, needed in zip(a, ctx.needs_input_grad, strict=False))
    ctx.save_for_backward(norm, *wanted)


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return None, None
    norm, z0, z1 = ctx.saved_tensors
    parts = ((z0, slice(0, ctx.first)), (z1, slice(ctx.first, None)))
    return tuple(None if z is None else _gradient(Gradient(upstream[part], z, norm[part])) for z, part in parts)


class Gradient(NamedTuple):
    upstream: Tensor
    z: Tensor
    norm: Tensor


def _gradient_forward(a: Gradient) -> Tensor:
    gradient = _gradient_fake(a)
    torch.ops.ssl_kernels.unit_rows_gradient_(a.upstream.contiguous(), unit_stride(a.z), a.norm, _EPS, gradient)
    return gradient


def _gradient_fake(a: Gradient) -> Tensor:
    return a.z.new_empty(a.z.shape)


_op = Op(
    "unit_rows",
    Arguments,
    "(Tensor rows, Tensor norm)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_gradient = Op(
    "unit_rows_gradient",
    Gradient,
    "Tensor",
    forward=_gradient_forward,
    fake=_gradient_fake,
    backward=no_double_backward,
)
