"""Barlow Twins loss module."""

from __future__ import annotations

from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.in_group import LossInGroup


class BarlowTwinsLoss(LossInGroup):
    r"""Redundancy reduction between two views; replaces ``lightly.loss.BarlowTwinsLoss``.

    :math:`L = \sum_j (C_{jj} - 1)^2 + \lambda \sum_{j \ne k} C_{jk}^2` where C is the cross-correlation of both views;
    see :func:`ssl_kernels.functional.barlow_twins_loss`.

    Args:
        lambda_param: :math:`\lambda`.
        gather_distributed: take the rows of all processes. Means, variances and C are those of all rows, as in the
            paper's code under SyncBatchNorm, so the loss does not depend on how the rows are spread over processes. In
            lightly it does: each process normalises its own rows, and C is averaged.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group, these are all processes if ``gather_distributed`` is True,
            otherwise this one alone.

    Source: Zbontar et al. 2021, arXiv:2103.03230.

    >>> import torch
    >>> from ssl_kernels import BarlowTwinsLoss
    >>> round(BarlowTwinsLoss()(torch.eye(4), torch.eye(4)).item(), 4)
    0.0067
    """

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, gather_distributed=gather_distributed)
        self.lambda_param = lambda_param

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views [batch, features]."""
        return K.barlow_twins_loss(z_a, z_b, lambda_param=self.lambda_param, **self.how())

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}, gather_distributed={self.gather_distributed}"
