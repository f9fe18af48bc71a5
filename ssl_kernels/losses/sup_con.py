"""Supervised contrastive loss module."""

from __future__ import annotations

import torch
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.in_group import LossInGroup
from ssl_kernels.losses.info_nce import positive_temperature


class SupConLoss(LossInGroup):
    r"""Supervised contrastive loss: rows that share a label attract each other.

    :math:`L_i = \log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau) - \frac{1}{|P_i|} \sum_{p \in P_i} z_i \cdot z_p / \tau`
    over the rows that have a positive; see :func:`ssl_kernels.functional.sup_con_loss`.

    Args:
        temperature: :math:`\tau`.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Labels mean the same on all of them. Without a group the loss is over the
            rows of this process alone.

    The attribute ``unpaired`` is a tensor that says how many rows of the last batch had no positive and contributed
    nothing. Reading it waits for the device.

    Source: Khosla et al. 2020, arXiv:2004.11362.

    >>> import torch
    >>> from ssl_kernels import SupConLoss
    >>> loss = SupConLoss(temperature=0.5)
    >>> round(loss(torch.eye(3), torch.tensor([7, 7, 8])).item(), 4), loss.unpaired.item()
    (0.6931, 1)
    """

    unpaired: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches)
        self.temperature = positive_temperature(temperature)
        self.register_buffer("unpaired", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of normalised features [N, D] with integer labels [N]. Several views of an image are rows with one
        label."""
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: expected a tensor of integers, got {got}")
        loss, unpaired = K.sup_con_loss(features, labels.long(), self.temperature, return_unpaired=True, **self.how())
        self.unpaired = unpaired
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
