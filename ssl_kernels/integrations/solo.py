"""Loss functions of solo-learn, call for call."""

from __future__ import annotations

from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.losses.moco import MoCoV3Loss


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo v2+ loss of normalised ``query`` and ``key`` [B, D] against a ``queue`` [D, K], which is read in place.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import mocov2plus_loss_func
    >>> keys = torch.eye(4)
    >>> round(mocov2plus_loss_func(keys[:2], keys[:2], queue=keys[2:].t(), temperature=0.2).item(), 4)
    0.0134
    """
    if queue.dim() != 2:
        raise ValueError(f"queue: expected 2 dimensions [features, keys], got shape {tuple(queue.shape)}")
    return K.info_nce_loss(query, key, queue.t(), 1 / temperature)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v3 loss in one direction, for ``query`` and frozen ``key`` [B, D], normalised here; keys of all processes.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import mocov3_loss_func
    >>> round(mocov3_loss_func(torch.eye(4), torch.eye(4)).item(), 4)
    0.008
    """
    return MoCoV3Loss(temperature, gather=True).one_direction(query, key)
