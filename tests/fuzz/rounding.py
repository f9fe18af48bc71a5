"""Float64 arithmetic that can pretend to round, by which the tolerance of each comparison is measured.

How far a loss in float32 may be from its formula depends on how well it is conditioned: at a logit of 1,000, float32
knows a probability to 6e-5. Instead of a bound for each op, each formula says where a computation in float32 rounds,
by ``rounded`` and ``product``. Inside ``rounding`` these change their results by a unit or two in the last place, up or
down at random, and so do they the gradients that pass through them; outside they do nothing. What comes out is as far
from the exact result as an implementation is that rounds at every step, and cannot average its errors.

    rounded(t)      t (1 + u (1.5 s + s_i)), a sign for all, as approximations of exp err to one side, and one for each
    product(a, b)   errors of a sum of K products of random signs: u sqrt(K) |a_i| |b_j|, and at least 2 u |a_i| |b_j|
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_unit = 0.0  # relative error of an operation
_stored = 0.0  # and of what is stored in the dtype of the features in between


@contextmanager
def rounding(unit: float, stored: float, seed: int) -> Iterator[None]:
    global _unit, _stored
    _unit, _stored = unit, stored
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        _unit = _stored = 0.0


def rounded(t: Tensor) -> Tensor:
    return _Rounded.apply(t, _unit) if _unit else t


def stored(t: Tensor) -> Tensor:
    """Rounded to the dtype of the features."""
    return _Rounded.apply(t, _stored) if _unit else t


def product(a: Tensor, b: Tensor) -> Tensor:
    return _Product.apply(a, b, _unit) if _unit else a @ b


def _signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape, dtype=torch.float64) * 2 - 1


def _perturb(t: Tensor, unit: float) -> Tensor:
    return t * (1 + unit * (1.5 * _signs(1) + _signs(*t.shape)).reshape(t.shape))  # never by nothing


def _perturbed_product(a: Tensor, b: Tensor, unit: float) -> Tensor:
    terms = a.norm(dim=1)[:, None] * b.norm(dim=0)
    return a @ b + unit * max(2, math.sqrt(a.shape[1])) * _signs(*terms.shape) * terms


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, unit: float) -> Tensor:
        ctx.unit = unit
        return _perturb(t, unit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _perturb(gradient, ctx.unit), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, unit: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.unit = unit
        return _perturbed_product(a, b, unit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return (
            _perturbed_product(gradient, b.t(), ctx.unit),
            _perturbed_product(a.t(), gradient, ctx.unit),
            None,
        )
