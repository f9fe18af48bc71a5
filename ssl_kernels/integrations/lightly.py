"""Modules of lightly, argument for argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.queue import gather_rows, keep_missing_bank, random_keys


class MemoryBankModule(nn.Module):
    """Replaces ``lightly.models.modules.memory_bank.MemoryBankModule``.

    Like lightly's, it returns the bank as it was before the update. Unlike lightly's, it keeps every row of a batch
    that wraps around the end of the bank, takes batches with more rows than the bank, does not wait for the device, and
    saves the bank in checkpoints. A checkpoint of lightly's has no bank and leaves this one as it is; lightly loads a
    checkpoint of ours with ``strict=False``. A call that updates the bank returns a copy, and other calls return a
    view.

    With :class:`ssl_kernels.KeyQueue` and :func:`ssl_kernels.functional.info_nce_loss` no copy is needed at all.

    Args:
        size: (rows, features) of the bank, or 0 for none.
        gather_distributed: update with the rows of all processes.
        feature_dim_first: True returns the bank as [features, rows], False as [rows, features].

    >>> import torch
    >>> from ssl_kernels.integrations.lightly import MemoryBankModule
    >>> output, negatives = MemoryBankModule(size=(512, 16))(torch.randn(8, 16), update=True)
    >>> negatives.shape
    torch.Size([16, 512])
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if self.size != (0,) and (len(self.size) != 2 or min(self.size) < 0):
            raise ValueError(f"size: expected (rows, features), or 0 to disable the memory bank, got {size}")
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(0) if self.size == (0,) else random_keys(*self.size))
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(keep_missing_bank)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``output`` [B, features] and the bank. With ``update``, ``output`` is then written into the bank.
        ``labels`` are ignored."""
        if self.size[0] == 0:
            return output, None
        bank = self.bank.clone() if update else self.bank
        if update:
            rows = gather_rows(output) if self.gather_distributed else output
            K.enqueue_(self.bank, self.bank_ptr, rows)
        return output, bank.t() if self.feature_dim_first else bank


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float | Tensor) -> None:
    """Replaces ``lightly.models.utils.update_momentum``: parameters of ``model_ema`` move towards those of ``model``.

    Parameters are paired by their order, as in lightly, but models that differ are refused. Buffers, such as
    BatchNorm's statistics, stay as they are; :class:`ssl_kernels.ModelEma` updates them too.

    >>> import torch
    >>> from ssl_kernels.integrations.lightly import update_momentum
    >>> model, model_ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model_ema.weight), torch.nn.init.ones_(model.weight)
    >>> update_momentum(model, model_ema, m=0.75)
    >>> model_ema.weight.item()
    0.25
    """
    K.ema_update_(model_ema.parameters(), model.parameters(), m)
