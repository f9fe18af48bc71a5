"""VICReg loss module."""

from __future__ import annotations

import torch
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.in_group import LossInGroup


class VICRegLoss(LossInGroup):
    r"""Variance-invariance-covariance regularisation; replaces ``lightly.loss.VICRegLoss``.

    :math:`L = \lambda \operatorname{mse}(a, b) + \frac{\mu}{2} [v(a) + v(b)] + \nu [c(a) + c(b)]`; see
    :func:`ssl_kernels.functional.vicreg_loss`.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        gather_distributed: take the rows of all processes, which may have different numbers of them. The gradients are
            lightly's. The value is the mean of the values that lightly shows on the processes, since there each process
            takes the invariance of its own rows.
        eps: added to the variance before its square root.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group, these are all processes if ``gather_distributed`` is True,
            otherwise this one alone.

    Source: Bardes et al. 2021, arXiv:2105.04906.

    >>> import torch
    >>> from ssl_kernels import VICRegLoss
    >>> round(VICRegLoss()(torch.eye(4), torch.eye(4)).item(), 4)
    12.5392
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, gather_distributed=gather_distributed)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views [batch, ..., features]. If there are dimensions between, it is the mean over them."""
        if z_a.shape != z_b.shape or z_a.dim() < 2:
            raise ValueError(
                f"z_a, z_b: expected one shape [batch, ..., features], got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
            )
        if z_a.dim() == 2:
            return self._loss(z_a, z_b)
        places = zip(z_a.flatten(1, -2).unbind(1), z_b.flatten(1, -2).unbind(1), strict=True)
        return torch.stack([self._loss(a, b) for a, b in places]).mean()

    def _loss(self, a: Tensor, b: Tensor) -> Tensor:
        return K.vicreg_loss(
            a, b, invariance_weight=self.lambda_param, variance_weight=self.mu_param,
            covariance_weight=self.nu_param, eps=self.eps, **self.how(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param}, "
            f"gather_distributed={self.gather_distributed}, eps={self.eps}"
        )
