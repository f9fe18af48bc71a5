r"""VICReg: arguments, reference, backends, fake and autograd.

With the centred views c = z - mean(z) [n, D], s_j = sum_i c_ij^2, sigma_j = sqrt(s_j / (n - 1) + eps) and C = c^T c,

    invariance   (1 / n D) sum_ij (za_ij - zb_ij)^2
    variance     (1 / D) sum_j max(0, 1 - sigma_j)                d / d c_ij = -[sigma_j < 1] c_ij / (D (n - 1) sigma_j)
    covariance   (1 / D (n - 1)^2) sum_{j != k} C_jk^2            d / d c_j = 4 / (D (n - 1)^2) sum_{k != j} C_jk c_k

The columns of the last two gradients sum to 0 as those of c do: what they are by c, they are by z. Value and gradients
are made together, in 2 units, for nothing else is needed of C; autograd, which does not know that C is symmetric, takes
3. A unit is 2 n^2 D or 2 n D^2 FLOP, whichever is less: see :mod:`ssl_kernels.ops.covariance`.
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
from ssl_kernels.ops.dino import unit_stride
from ssl_kernels.ops.key_softmax import widen
from ssl_kernels.ops.strips import gathered
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu",)


def vicreg_loss(
    za: Tensor,
    zb: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    eps: float = 1e-4,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
) -> Tensor:
    r"""VICReg: two views agree, each feature varies over the batch, and no two features are correlated.

    .. math:: L = \frac{\lambda}{n D} \sum_{ij} (a_{ij} - b_{ij})^2
                + \frac{\mu}{2} [v(a) + v(b)] + \nu [c(a) + c(b)]

    .. math:: v(z) = \frac{1}{D} \sum_j \max\Big(0, 1 - \sqrt{C_{jj} + \epsilon}\Big), \qquad
              c(z) = \frac{1}{D} \sum_{j \ne k} C_{jk}^2, \qquad C = \operatorname{cov}(z) \text{ over } n - 1

    as in the authors' code and in lightly. The paper and solo-learn add v(a) and v(b) instead of taking their mean: for
    theirs, pass twice the ``variance_weight``.

    Args:
        za, zb: [n, D] features of two views with at least 2 rows, in float32, bfloat16, float16 or float64 and with any
            strides.
        invariance_weight, variance_weight, covariance_weight: the weights :math:`\lambda, \mu, \nu`.
        eps: :math:`\epsilon > 0`, added to the variance before its square root.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone. In a group,
            a process may have fewer than 2 rows.

    Returns:
        The loss, computed and returned in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    If 2 n <= D, the sum of squares goes through the n x n products of rows instead of C, which takes D / n times fewer
    operations; its rounding error is then relative to the sum of all squared covariances, including the diagonal. At
    most ``SSL_KERNELS_WORKSPACE_MB`` megabytes of either matrix exist at a time. The gradients are computed in the
    forward pass and kept, [n, D] each in float32. Autocast has no effect here; float32 products follow
    ``torch.get_float32_matmul_precision()``. Several processes share the operations. If 2 n <= D, features travel
    between them, and otherwise panels of C; in both cases, so do a few sums of D numbers in float64. Gradients never
    travel.

    Source: Bardes et al., VICReg: Variance-Invariance-Covariance Regularization, 2021, arXiv:2105.04906.

    >>> import torch, ssl_kernels.functional as K
    >>> za = torch.arange(12.0).reshape(4, 3).sin().requires_grad_()
    >>> loss = K.vicreg_loss(za, za.detach().flip(0))
    >>> loss.backward()
    >>> round(loss.item(), 3), tuple(za.grad.shape)
    (57.449, (4, 3))
    """
    za, zb = _checks.autocast_widest(za, zb)
    over = across(group, strategy, grad_reduce, even_batches, False, "mean")
    check_views(za, zb, over.group)
    _checks.check_numbers(
        invariance_weight=invariance_weight, variance_weight=variance_weight, covariance_weight=covariance_weight
    )
    _checks.check_eps(eps)
    weights = (invariance_weight, variance_weight, covariance_weight)
    backend = choose_backend(za.device, za.dtype, KERNELS)
    if backend == "reference":
        (za, zb), _, _ = gathered(over, (za, zb), (), what="vicreg_loss", weights=weights, eps=eps)
        return reference(za, zb, *weights, eps)
    _checks.check_transforms(za, zb)
    grad = torch.is_grad_enabled()
    wanted = grad and za.requires_grad, grad and zb.requires_grad
    workspace = workspace_bytes(za.device)
    arguments = Arguments(za, zb, *weights, eps, *wanted, workspace, backend == "cpu", **over._asdict())
    loss: Tensor = _op(arguments)[0]
    return loss


def reference(
    za: Tensor, zb: Tensor, invariance_weight: float, variance_weight: float, covariance_weight: float, eps: float
) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    with _checks.without_autocast(za):
        za, zb = widen(za), widen(zb)
        loss = invariance_weight * F.mse_loss(za, zb)
        for z in (za, zb):
            c = z - z.mean(0)
            covariance = c.t() @ c / (len(z) - 1)
            variance = covariance.diagonal()
            squares = (covariance - variance.diag()).square().sum() / z.shape[1]
            loss = loss + 0.5 * variance_weight * F.relu(1 - torch.sqrt(variance + eps)).mean()
            loss = loss + covariance_weight * squares
        return loss


class Arguments(NamedTuple):
    za: Tensor
    zb: Tensor
    invariance_weight: float
    variance_weight: float
    covariance_weight: float
    eps: float
    want_a: bool
    want_b: bool
    workspace: int
    in_cpp: bool  # by the kernels of the CPU
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


def _forward(a: Arguments) -> Result:
    """The loss, and the gradients that are wanted."""
    with _checks.without_autocast(a.za):
        return _forward_cpp(a) if a.in_cpp and not a.group else _forward_eager(a)


def _forward_cpp(a: Arguments) -> Result:
    ca, cb, columns = covariance.fused_views(a.za, a.zb)
    squares_a, da, _ = off_diagonal_squares(ca, ca, columns[0], a.want_a, False, a.workspace, a.in_cpp)
    squares_b, db, _ = off_diagonal_squares(cb, cb, columns[1], a.want_b, False, a.workspace, a.in_cpp)
    loss = columns.new_empty(())
    za, zb = unit_stride(a.za), unit_stride(a.zb)
    weights = a.invariance_weight, a.variance_weight, a.covariance_weight
    torch.ops.ssl_kernels.vicreg_finish_(za, zb, ca, cb, columns, squares_a, squares_b, *weights, a.eps, loss, da, db)
    return covariance.result(loss, da, db, a.za.shape[1])


def _forward_eager(a: Arguments) -> Result:
    weights = a.invariance_weight, a.variance_weight, a.covariance_weight
    views = Views(a, "vicreg_loss", weights=weights, eps=a.eps)
    rows, width = views.rows, a.za.shape[1]
    by_pair = a.invariance_weight / (rows * width)
    by_square = a.covariance_weight / (width * (rows - 1) ** 2)
    difference = torch.sub(widen(a.za), widen(a.zb))
    sums = views.sums(*(torch.linalg.vecdot(t, t, dim=0) for t in (*views.own, difference)))
    loss = by_pair * wide(sums[2]).sum()
    gradients = []
    for c, squares, want, sign in zip(views.own, sums, (a.want_a, a.want_b), (1, -1), strict=False):
        sigma = torch.sqrt(squares / (rows - 1) + a.eps)
        off_diagonal, gradient, _ = off_diagonal_squares(
            c, c, squares.to(c.dtype), want, False, a.workspace, a.in_cpp, views
        )
        loss = loss + 0.5 * a.variance_weight * wide(F.relu(1 - sigma)).mean() + by_square * off_diagonal
        if gradient is not None:
            gradient *= 4 * by_square * views.factor
            slope = ((sigma < 1) / sigma).to(c.dtype)
            gradient.addcmul_(c, slope, value=-0.5 * a.variance_weight * views.factor / (width * (rows - 1)))
            gradient.add_(difference, alpha=sign * 2 * by_pair * views.factor)
        gradients.append(gradient)
    da, db = gradients
    return covariance.result(loss.to(difference.dtype), da, db, width)


_op: Op[Arguments] = Op(
    "vicreg",
    Arguments,
    covariance.RESULT,
    forward=_forward,
    fake=covariance.fake,
    setup_context=covariance.setup_context,
    backward=covariance.backward,
)
