r"""Barlow Twins: arguments, reference, backends, fake and autograd.

With views of mean 0 and variance 1, a = (za - mean(za)) / sigma, sigma^2 = var(za) + 1e-5, and C = a^T b / n,

    L = sum_j (C_jj - 1)^2 + lambda sum_{j != k} C_jk^2
    g_j = d L / d a_j = (2 / n) (C_jj - 1) b_j + (2 lambda / n) sum_{k != j} C_jk b_k
    d L / d za_j = (g_j - (g_j . a_j / n) a_j) / sigma_j

for the columns of g sum to 0 as those of b do. The squares off the diagonal, and their gradients, take 3 units of
2 n D^2 FLOP or 4 of 2 n^2 D: see :mod:`ssl_kernels.ops.covariance`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.distributed import Group, across
from ssl_kernels.ops import _checks, covariance
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.covariance import Result, Views, check_views, off_diagonal_squares, wide
from ssl_kernels.ops.key_softmax import widen
from ssl_kernels.ops.strips import gathered
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu",)

_EPS = 1e-5  # of batch normalisation


def barlow_twins_loss(
    za: Tensor,
    zb: Tensor,
    *,
    lambda_param: float = 5e-3,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
) -> Tensor:
    r"""Barlow Twins: brings the cross-correlation matrix of two views' features close to the identity.

    .. math:: L = \sum_j (C_{jj} - 1)^2 + \lambda \sum_{j \ne k} C_{jk}^2, \qquad
              C = \frac{1}{n} \sum_i a_i b_i^T

    where a and b are the two views with each feature brought to mean 0 and variance 1 over the batch, as batch
    normalisation does (1e-5 is added to the variance).

    Args:
        za, zb: [n, D] features of two views, as in :func:`vicreg_loss`.
        lambda_param: the weight :math:`\lambda`.
        group, strategy, grad_reduce, even_batches: as in :func:`vicreg_loss`. Means and variances are those of the
            whole batch, as in the paper's code under SyncBatchNorm.

    Returns:
        The loss, computed and returned in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

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
    over = across(group, strategy, grad_reduce, even_batches, False, "mean")
    check_views(za, zb, over.group)
    _checks.check_numbers(lambda_param=lambda_param)
    backend = choose_backend(za.device, za.dtype, KERNELS)
    if backend == "reference":
        (za, zb), _, _ = gathered(over, (za, zb), (), what="barlow_twins_loss", lambda_param=lambda_param)
        return reference(za, zb, lambda_param)
    _checks.check_transforms(za, zb)
    grad = torch.is_grad_enabled()
    wanted = grad and za.requires_grad, grad and zb.requires_grad
    in_cpp = backend == "cpu"
    workspace = workspace_bytes(za.device)
    loss: Tensor = _op(Arguments(za, zb, lambda_param, *wanted, workspace, in_cpp, **over._asdict()))[0]
    return loss


def reference(za: Tensor, zb: Tensor, lambda_param: float) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    with _checks.without_autocast(za):
        a, b = (F.batch_norm(widen(z), None, None, training=True, eps=_EPS) for z in (za, zb))
        correlation = a.t() @ b / len(a)
        diagonal = correlation.diagonal()
        others = correlation - diagonal.diag()
        return (diagonal - 1).square().sum() + lambda_param * others.square().sum()


class Arguments(NamedTuple):
    za: Tensor
    zb: Tensor
    lambda_param: float
    want_a: bool
    want_b: bool
    workspace: int
    in_cpp: bool  # by the kernels of the CPU
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


def _forward(arguments: Arguments) -> Result:
    """The loss, and the gradients that are wanted."""
    with _checks.without_autocast(arguments.za):
        return _forward_cpp(arguments) if arguments.in_cpp and not arguments.group else _forward_eager(arguments)


def _forward_cpp(arguments: Arguments) -> Result:
    a, b, columns = covariance.fused_views(arguments.za, arguments.zb, _EPS)
    squares, da, db = off_diagonal_squares(
        a, b, columns[2], arguments.want_a, arguments.want_b, arguments.workspace, arguments.in_cpp
    )
    loss = columns.new_empty(())
    torch.ops.ssl_kernels.barlow_twins_finish_(a, b, columns, squares, arguments.lambda_param, loss, da, db)
    return covariance.result(loss, da, db, a.shape[1])


def _forward_eager(arguments: Arguments) -> Result:
    views = Views(arguments, "barlow_twins_loss", lambda_param=arguments.lambda_param)
    sigma_a, sigma_b = views.standardise(_EPS)
    a, b = views.own
    rows, width = views.rows, a.shape[1]
    factor = arguments.lambda_param / rows**2
    (products,) = views.sums(torch.linalg.vecdot(a, b, dim=0))
    off_diagonal, da, db = off_diagonal_squares(
        a, b, products.to(a.dtype), arguments.want_a, arguments.want_b, arguments.workspace, arguments.in_cpp, views
    )
    missing = products / rows - 1
    loss = wide(missing).square().sum() + factor * off_diagonal
    for gradient, own, other, sigma in ((da, a, b, sigma_a), (db, b, a, sigma_b)):
        if gradient is not None:
            gradient *= 2 * factor * views.factor
            gradient.addcmul_(other, missing.to(a.dtype), value=2 / rows * views.factor)
            (along,) = views.sums(torch.linalg.vecdot(gradient, own, dim=0))
            gradient.addcmul_(own, along.to(a.dtype), value=-1 / rows)
            gradient /= sigma
    return covariance.result(loss.to(a.dtype), da, db, width)


_op: Op[Arguments] = Op(
    "barlow_twins",
    Arguments,
    covariance.RESULT,
    forward=_forward,
    fake=covariance.fake,
    setup_context=covariance.setup_context,
    backward=covariance.backward,
)
