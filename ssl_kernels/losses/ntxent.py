"""NT-Xent loss module."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.losses.infonce import positive_temperature
from ssl_kernels.queue import KeyQueue


class NTXentLoss(nn.Module):
    r"""Normalised temperature-scaled cross-entropy of SimCLR; replaces ``lightly.loss.NTXentLoss``.

    :math:`L = \frac{1}{2N} \sum_i (\log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau) - z_i \cdot z_{p(i)} / \tau)`, over
    the 2 N normalised rows of both views. See :func:`ssl_kernels.functional.nt_xent_loss`. With a memory bank the
    negatives are past rows of the second view: InfoNCE, see :func:`ssl_kernels.functional.info_nce_loss`.

    Args:
        temperature: :math:`\tau`.
        memory_bank_size: (number of rows, features) of the bank, or 0 for none. The bank is written after the loss,
            while the first view requires a gradient; it is part of ``state_dict``.
        gather_distributed: put the rows of all processes into the bank. Without a bank, negatives across processes are
            not implemented in this version.

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
    ) -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)
        self.gather_distributed = gather_distributed
        self.memory_bank: KeyQueue | None = None
        if memory_bank_size not in (0, (0,)):
            if isinstance(memory_bank_size, int) or len(memory_bank_size) != 2:
                raise ValueError(f"memory_bank_size: expected (rows, features) or 0, got {memory_bank_size!r}")
            size, dim = memory_bank_size
            self.memory_bank = KeyQueue(size, dim, gather=gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [N, D] of a batch, normalised here."""
        if self.memory_bank is None:
            if self.gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                raise NotImplementedError(
                    "NTXentLoss: gather_distributed in several processes is only implemented for a memory bank in this "
                    "version"
                )
            return K.nt_xent_loss(out0, out1, self.temperature)
        query, key = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        loss = K.info_nce_loss(query, key, self.memory_bank.keys, 1 / self.temperature)
        if query.requires_grad:
            self.memory_bank.enqueue(key)
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"
