"""The way back of a gradient that the forward pass has made: times the upstream one, without a copy where possible."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops._op import Op, may_overwrite
from ssl_kernels.ops.contrastive import no_double_backward
from ssl_kernels.ops.spans import spans


def hand_over(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """The gradient [V, B, K] times the factor of its sample, [B]; called by a backward pass.

    In place where nobody can ask for it again.
    """
    if may_overwrite(gradient, factor):
        return scale_(gradient.detach(), factor, backend)
    scaled: Tensor = scale(Scaling(gradient, factor))
    return scaled


def scale_(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """In place; by a kernel, or on a CPU, nothing at all where the factor is 1."""
    if backend == "triton":
        from ssl_kernels.kernels import dino as kernels

        kernels.scale_(gradient, factor)
    elif gradient.device.type != "cpu":  # where to look would be to wait
        torch.mul(gradient, factor[:, None], out=gradient)
    elif bool((factor != 1).any()):
        _multiply(gradient, factor, gradient)
    return gradient


def _multiply(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    for begin, end in spans(gradient.shape[1], gradient.shape[0] * gradient.shape[2]):
        part = slice(begin, end)
        torch.mul(gradient[:, part], factor[part, None], out=out[:, part])
    return out


class Scaling(NamedTuple):
    gradient: Tensor
    factor: Tensor


def _scaled(a: Scaling) -> Tensor:
    if a.gradient.device.type != "cpu":
        return (a.gradient * a.factor[:, None]).to(a.gradient.dtype)
    return _multiply(a.gradient, a.factor, torch.empty_like(a.gradient))


# An op of its own, so that differentiating a gradient again meets an error instead of a wrong result.
scale = Op(
    "scale_dino_gradient",
    Scaling,
    "Tensor",
    forward=_scaled,
    fake=lambda a: torch.empty_like(a.gradient),
    backward=no_double_backward,
)
