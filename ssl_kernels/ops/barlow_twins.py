r"""Barlow Twins: schema, reference, fake and autograd.

With views of mean 0 and variance 1, a = (za - mean(za)) / sigma, sigma^2 = var(za) + 1e-5, and C = a^T b / n,

    L = sum_j (C_jj - 1)^2 + lambda sum_{j != k} C_jk^2
    g_j = d L / d a_j = (2 / n) (C_jj - 1) b_j + (2 lambda / n) sum_{k != j} C_jk b_k
    d L / d za_j = (g_j - (g_j . a_j / n) a_j) / sigma_j

for the columns of g sum to 0 as those of b do. The squares off the diagonal, and their gradients, take 3 units of
2 n D^2 FLOP or 4 of 2 n^2 D: see :mod:`ssl_kernels.ops.covariance`. All of it is plain PyTorch on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.covariance import (
    backward,
    centered,
    check_views,
    off_diagonal_squares,
    setup_context,
    wide,
)
from ssl_kernels.ops.key_softmax import widen
from ssl_kernels.settings import choose_backend

_EPS = 1e-5  # of batch normalisation


def barlow_twins_loss(za: Tensor, zb: Tensor, *, lambda_param: float = 5e-3) -> Tensor:
    r"""Barlow Twins: the cross-correlation of two views' features is to be the identity.

    .. math:: L = \sum_j (C_{jj} - 1)^2 + \lambda \sum_{j \ne k} C_{jk}^2, \qquad
              C = \frac{1}{n} \sum_i a_i b_i^T

    where each feature of a and b has been brought to mean 0 and variance 1 over the batch, as by batch normalisation
    (1e-5 is added to the variance).

    Args:
        za, zb: [n, D] features of two views, as in :func:`vicreg_loss`.
        lambda_param: :math:`\lambda`.

    Returns:
        The loss, computed and returned in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Operations, memory and precision are as in :func:`vicreg_loss`.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, arXiv:2103.03230.

    >>> import torch, ssl_kernels.functional as K
    >>> za = torch.arange(12.0).reshape(4, 3).sin().requires_grad_()
    >>> loss = K.barlow_twins_loss(za, za.detach().flip(0))
    >>> loss.backward()
    >>> round(loss.item(), 3), tuple(za.grad.shape)
    (9.797, (4, 3))
    """
    za, zb = _checks.autocast_widest(za, zb)
    check_views(za, zb)
    _checks.check_numbers(lambda_param=lambda_param)
    if choose_backend(za.device.type, za.dtype) == "reference":
        return reference(za, zb, lambda_param)
    _checks.check_transforms(za, zb)
    wanted = (torch.is_grad_enabled() and z.requires_grad for z in (za, zb))
    return _barlow_twins(za, zb, lambda_param, *wanted)[0]


def reference(za: Tensor, zb: Tensor, lambda_param: float) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    with _checks.without_autocast(za):
        a, b = (F.batch_norm(widen(z), None, None, training=True, eps=_EPS) for z in (za, zb))
        correlation = a.t() @ b / len(a)
        diagonal = correlation.diagonal()
        others = correlation - diagonal.diag()
        return (diagonal - 1).square().sum() + lambda_param * others.square().sum()


@torch.library.custom_op(
    "ssl_kernels::barlow_twins",
    mutates_args=(),
    schema=(
        "(Tensor za, Tensor zb, float lambda_param, bool want_a, bool want_b) -> (Tensor loss, Tensor da, Tensor db)"
    ),
)
def _barlow_twins(
    za: Tensor, zb: Tensor, lambda_param: float, want_a: bool, want_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in the accumulation dtype; empty where not wanted."""
    rows, width = za.shape
    with _checks.without_autocast(za):
        (a, sigma_a), (b, sigma_b) = _standardise(za), _standardise(zb)
        products = torch.linalg.vecdot(a, b, dim=0)
        off_diagonal, da, db = off_diagonal_squares(a, b, products, want_a, want_b)
        loss = wide(products / rows - 1).square().sum() + lambda_param / rows**2 * off_diagonal
        for gradient, own, other, sigma in ((da, a, b, sigma_a), (db, b, a, sigma_b)):
            if gradient is not None:
                gradient *= 2 * lambda_param / rows**2
                gradient.addcmul_(other, products / rows - 1, value=2 / rows)
                gradient.addcmul_(own, torch.linalg.vecdot(gradient, own, dim=0), value=-1 / rows)
                gradient /= sigma
        da, db = (a.new_empty(0, width) if gradient is None else gradient for gradient in (da, db))
        return loss.to(a.dtype), da, db


def _standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """z with columns of mean 0 and variance 1, and by what they were divided."""
    c = centered(z)
    sigma = torch.sqrt(torch.linalg.vecdot(c, c, dim=0) / len(c) + _EPS)
    return c.div_(sigma), sigma


@_barlow_twins.register_fake
def _(za: Tensor, zb: Tensor, lambda_param: float, want_a: bool, want_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide_a = widen(za)
    da, db = (wide_a.new_empty(za.shape[0] if want else 0, za.shape[1]) for want in (want_a, want_b))
    return wide_a.new_empty(()), da, db


_barlow_twins.register_autograd(backward, setup_context=setup_context)
