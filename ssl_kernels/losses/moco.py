"""Loss modules of momentum contrast: MoCo v1 and v2 against a queue, MoCo v3 within the batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group, across
from ssl_kernels.losses.in_group import LossInGroup
from ssl_kernels.losses.info_nce import positive_temperature
from ssl_kernels.ops._checks import autocast_features
from ssl_kernels.ops.info_nce import fused_info_nce
from ssl_kernels.ops.key_softmax import check_keys
from ssl_kernels.ops.unit_rows import fused_unit_rows
from ssl_kernels.queue import KeyQueue


class MoCoLoss(nn.Module):
    r"""InfoNCE against a queue of past keys. The new keys are written into the queue once the loss is computed.

    Args:
        temperature: divides the similarities; 0.07 in MoCo v1, 0.2 in v2.

    Source: He et al. 2019, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297.

    >>> import torch
    >>> from ssl_kernels import KeyQueue, MoCoLoss
    >>> queue, features = KeyQueue(size=128, dim=8), torch.randn(16, 8)
    >>> loss = MoCoLoss(temperature=0.2)(features, features, queue)
    >>> queue.pointer.item()
    16
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)

    def forward(self, query: Tensor, key: Tensor, queue: KeyQueue, update: bool = True) -> Tensor:
        """The loss of ``query`` [B, D] and the momentum encoder's ``key`` [B, D], which are both normalised here.

        Pass ``update=False`` to leave the queue as it is, as in an evaluation.
        """
        query, key = fused_unit_rows(query, name="query"), fused_unit_rows(key, name="key")
        loss = K.info_nce_loss(query, key, queue.keys, 1 / self.temperature)
        if update:
            queue.enqueue(key)
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class MoCoV3Loss(LossInGroup):
    r"""Symmetric InfoNCE within the batch: the queries of each view against the momentum keys of the other.

    :math:`L = \ell(q_1, k_2) + \ell(q_2, k_1)`, where
    :math:`\ell(q, k) = -2 \tau \frac{1}{B} \sum_i \log \operatorname{softmax}_j(q_i \cdot k_j / \tau)_{j = i}`.

    Args:
        temperature: :math:`\tau`; 1.0 for ResNets, 0.2 for vision transformers.
        gather: take the keys of all ``torch.distributed`` processes.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group, these are all processes if ``gather`` is True, otherwise
            this one alone.

    Source: Chen et al. 2021, arXiv:2104.02057.

    >>> import torch
    >>> from ssl_kernels import MoCoV3Loss
    >>> views = torch.eye(4)
    >>> round(MoCoV3Loss(temperature=0.2)(views, views, views, views).item(), 4)
    0.016
    """

    def __init__(
        self,
        temperature: float = 1.0,
        gather: bool = False,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, gather_distributed=gather and dist.is_available())
        self.temperature = positive_temperature(temperature)
        self.gather = gather

    def forward(self, q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """The loss of the queries and the frozen keys of two views, each [B, D]. All are normalised here."""
        return 2 * self.temperature * (self._cross_entropy(q1, k2) + self._cross_entropy(q2, k1))

    def one_direction(self, query: Tensor, key: Tensor) -> Tensor:
        """The loss in one direction: one view's queries and the other view's keys."""
        return 2 * self.temperature * self._cross_entropy(query, key)

    def _cross_entropy(self, query: Tensor, key: Tensor) -> Tensor:
        if key.shape != query.shape:
            raise ValueError(f"key: expected the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}")
        query, key = fused_unit_rows(query, name="query"), fused_unit_rows(key, name="key")
        query, key = autocast_features(query, key)  # the positive must be rounded as it is among the keys
        check_keys(query, key=key)
        over = across(**self.how(), own_share=False, reduction="mean")
        return fused_info_nce(query, key, key, 1 / self.temperature, "mean", positive_is_key=True, over=over)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather={self.gather}"
