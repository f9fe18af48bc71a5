"""Barlow Twins loss module."""

from __future__ import annotations

from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import check_gather_distributed, refuse_several_processes


class BarlowTwinsLoss(nn.Module):
    r"""Redundancy reduction between two views; replaces ``lightly.loss.BarlowTwinsLoss``.

    :math:`L = \sum_j (C_{jj} - 1)^2 + \lambda \sum_{j \ne k} C_{jk}^2` with the cross-correlation C of both views; see
    :func:`ssl_kernels.functional.barlow_twins_loss`.

    Args:
        lambda_param: :math:`\lambda`.
        gather_distributed: average C over the processes; in several it is not implemented in this version.

    Source: Zbontar et al. 2021, arXiv:2103.03230.

    >>> import torch
    >>> from ssl_kernels import BarlowTwinsLoss
    >>> round(BarlowTwinsLoss()(torch.eye(4), torch.eye(4)).item(), 4)
    0.0067
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        check_gather_distributed(gather_distributed)
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views [batch, features]."""
        if self.gather_distributed:
            refuse_several_processes("BarlowTwinsLoss: gather_distributed")
        return K.barlow_twins_loss(z_a, z_b, lambda_param=self.lambda_param)

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}, gather_distributed={self.gather_distributed}"
