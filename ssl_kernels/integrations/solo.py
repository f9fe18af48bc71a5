"""Loss functions of solo-learn, call for call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.losses.infonce import positive_temperature
from ssl_kernels.losses.moco import MoCoV3Loss
from ssl_kernels.losses.supcon import SupConLoss


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
    return K.info_nce_loss(query, key, queue.t(), 1 / positive_temperature(temperature))


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR loss of two views of every index among the rows of ``z`` [2 B, D], normalised here.

    Of more than two views solo-learn takes the logarithm of the positives' summed probabilities, this the mean of their
    logarithms: Khosla et al. 2020, arXiv:2004.11362, found the latter to learn better.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import simclr_loss_func
    >>> round(simclr_loss_func(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2), temperature=0.5).item(), 4)
    0.5944
    """
    return SupConLoss(temperature)(F.normalize(z, dim=-1), indexes)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v3 loss in one direction, for ``query`` and frozen ``key`` [B, D], normalised here; keys of all processes.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import mocov3_loss_func
    >>> round(mocov3_loss_func(torch.eye(4), torch.eye(4)).item(), 4)
    0.008
    """
    return MoCoV3Loss(temperature, gather=True).one_direction(query, key)
