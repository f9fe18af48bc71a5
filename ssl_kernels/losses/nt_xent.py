"""NT-Xent loss module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.in_group import LossInGroup
from ssl_kernels.losses.info_nce import positive_temperature
from ssl_kernels.ops.unit_rows import fused_unit_rows
from ssl_kernels.queue import KeyQueue, keep_missing_bank


class NTXentLoss(LossInGroup):
    r"""Normalised temperature-scaled cross-entropy of SimCLR; replaces ``lightly.loss.NTXentLoss``.

    :math:`L = \frac{1}{2N} \sum_i (\log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau) - z_i \cdot z_{p(i)} / \tau)`, over
    the 2 N normalised rows of both views. See :func:`ssl_kernels.functional.nt_xent_loss`. With a memory bank, the
    negatives are past rows of the second view instead, as in :func:`ssl_kernels.functional.info_nce_loss`.

    Args:
        temperature: :math:`\tau`.
        memory_bank_size: (rows, features) of the bank; 0, or 0 rows, for none. The bank is written after the loss, if
            the first view requires a gradient. It is part of ``state_dict``, which lightly's is not. A checkpoint of
            lightly's therefore leaves the bank as it is, and lightly loads a checkpoint of ours with ``strict=False``.
        gather_distributed: take the rows of all processes, as negatives or into the bank.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together, or whose rows go
            into the bank; see :mod:`ssl_kernels.distributed`. Without a group, these are all processes if
            ``gather_distributed`` is True, otherwise this one alone.

    Source: Chen et al. 2020, arXiv:2002.05709.

    >>> import torch
    >>> from ssl_kernels import NTXentLoss
    >>> round(NTXentLoss(temperature=0.5)(torch.eye(4), torch.eye(4)).item(), 4)
    0.5944
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, gather_distributed=gather_distributed)
        self.temperature = positive_temperature(temperature)
        self.memory_bank: KeyQueue | None = None
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(f"memory_bank_size: expected (rows, features) or 0, got {memory_bank_size!r}")
        if size[0] > 0:
            self.memory_bank = KeyQueue(*size, gather=gather_distributed or group is not None, group=group)
        self.register_load_state_dict_pre_hook(keep_missing_bank)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [N, D] of a batch, which are normalised here."""
        if self.memory_bank is None:
            return K.nt_xent_loss(out0, out1, self.temperature, **self.how())
        query, key = fused_unit_rows(out0, name="out0"), fused_unit_rows(out1, name="out1")
        loss = K.info_nce_loss(query, key, self.memory_bank.keys, 1 / self.temperature)
        if query.requires_grad:
            self.memory_bank.enqueue(key)
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"
