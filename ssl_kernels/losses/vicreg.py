"""VICReg loss module."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import check_gather_distributed, several_processes


class VICRegLoss(nn.Module):
    r"""Variance-invariance-covariance regularisation; replaces ``lightly.loss.VICRegLoss``.

    :math:`L = \lambda \operatorname{mse}(a, b) + \frac{\mu}{2} [v(a) + v(b)] + \nu [c(a) + c(b)]`; see
    :func:`ssl_kernels.functional.vicreg_loss`.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        gather_distributed: take variance and covariance over the rows of all processes, whose batches must be of one
            size. Gradients flow back to each: after their mean over the processes, as DistributedDataParallel takes
            it, those of variance and covariance are the gradients of one process with all rows.
        eps: added to the variance.

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
    ) -> None:
        super().__init__()
        check_gather_distributed(gather_distributed)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views [batch, ..., features]; of features at several places, the mean over the places."""
        if z_a.shape != z_b.shape or z_a.dim() < 2:
            raise ValueError(
                f"z_a, z_b: expected one shape [batch, ..., features], got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
            )
        if z_a.dim() == 2:
            return self._loss(z_a, z_b)
        places = zip(z_a.flatten(1, -2).unbind(1), z_b.flatten(1, -2).unbind(1), strict=True)
        return torch.stack([self._loss(a, b) for a, b in places]).mean()

    def _loss(self, a: Tensor, b: Tensor) -> Tensor:
        invariance = None
        invariance_weight = self.lambda_param
        if self.gather_distributed and several_processes():
            wide = torch.promote_types(a.dtype, torch.float32)
            invariance = self.lambda_param * F.mse_loss(a.to(wide), b.to(wide))  # of a process's own pairs
            invariance_weight = 0.0
            a, b = (torch.cat(_Gather.apply(z)) for z in (a, b))
        loss = K.vicreg_loss(
            a, b, invariance_weight=invariance_weight, variance_weight=self.mu_param,
            covariance_weight=self.nu_param, eps=self.eps,
        )  # fmt: skip
        return loss if invariance is None else invariance + loss

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param}, "
            f"gather_distributed={self.gather_distributed}, eps={self.eps}"
        )


class _Gather(torch.autograd.Function):
    """The rows of all processes, by rank. The gradient of a process's rows is the sum of what all have for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, ...]:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        return total[dist.get_rank()]
