"""KoLeo loss module."""

from __future__ import annotations

from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group, across
from ssl_kernels.losses.in_group import LossInGroup


class KoLeoLoss(LossInGroup):
    r"""KoLeo regulariser of DINOv2; replaces ``lightly.loss.KoLeoLoss``.

    :math:`L = -\frac{1}{B} \sum_i \log(\lVert u_i - u_{n(i)} + \epsilon \rVert + \epsilon)`, where :math:`u_{n(i)}` is
    the nearest of the other normalised rows; see :func:`ssl_kernels.functional.koleo_loss`.

    Args:
        p: the norm of the distance; only 2 is implemented.
        eps: :math:`\epsilon` above, which keeps the loss of equal rows finite.
        gather_distributed: look for the neighbours among the rows of all processes.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group, these are all processes if ``gather_distributed`` is True,
            otherwise this one alone.

    Source: Sablayrolles et al. 2018, arXiv:1806.03198; Oquab et al. 2023, arXiv:2304.07193.

    >>> import torch
    >>> from ssl_kernels import KoLeoLoss
    >>> round(KoLeoLoss()(torch.eye(4)).item(), 4)
    -0.3466
    """

    def __init__(
        self,
        p: float = 2,
        eps: float = 1e-8,
        gather_distributed: bool = False,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, gather_distributed=gather_distributed)
        if p != 2:
            raise ValueError(f"p: expected 2, the only norm that is implemented, got {p!r}")
        self.p = p
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The loss of features [B, D], which are normalised here. A single row is its own neighbour, as in lightly."""
        how = self.how()
        if x.dim() == 2 and len(x) == 1 and not across(**how, own_share=False, reduction="mean").group:
            x = x.expand(2, -1)
        return K.koleo_loss(x, eps=self.eps, **how)

    def extra_repr(self) -> str:
        return f"p={self.p}, eps={self.eps}, gather_distributed={self.gather_distributed}"
