"""Loss functions and the momentum updater of solo-learn, call for call."""

from __future__ import annotations

from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import world
from ssl_kernels.losses.info_nce import positive_temperature
from ssl_kernels.losses.moco import MoCoV3Loss
from ssl_kernels.losses.sup_con import SupConLoss
from ssl_kernels.losses.vicreg import VICRegLoss
from ssl_kernels.ops._checks import check_fraction
from ssl_kernels.ops.unit_rows import fused_unit_rows
from ssl_kernels.schedules import cosine_momentum


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """MoCo v2+ loss of normalised ``query`` and ``key`` [B, D] against a ``queue`` [D, K], which is not copied.

    Args:
        query, key, queue: normalised features; ``key`` and ``queue`` without gradient.
        temperature: divides the similarities.

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
    """SimCLR loss of two views of each image.

    The rows of all processes are taken together; each process may have any number of them. As in solo-learn,
    ``indexes`` must differ between images of different processes, and the value on every process is the mean over all
    rows.

    With more than two views, this function takes the mean of the logarithms of the positives' probabilities, where
    solo-learn takes the logarithm of their sum. Khosla et al. 2020, arXiv:2004.11362, found that the former learns
    better.

    Args:
        z: [2 B, D] features of all views, which are normalised here.
        indexes: integers [2 B], equal for views of one image.
        temperature: divides the similarities.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import simclr_loss_func
    >>> round(simclr_loss_func(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2), temperature=0.5).item(), 4)
    0.5944
    """
    return SupConLoss(temperature, group=world())(fused_unit_rows(z), indexes)


def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    """VICReg loss of two views [N, D]. Its variance term is the sum over both views.

    The rows of all processes are taken together; each process may have any number of them.

    Args:
        z1, z2: the two views.
        sim_loss_weight, var_loss_weight, cov_loss_weight: weights of invariance, variance and covariance.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import vicreg_loss_func
    >>> round(vicreg_loss_func(torch.eye(4), torch.eye(4)).item(), 4)
    25.0367
    """
    return VICRegLoss(sim_loss_weight, 2 * var_loss_weight, cov_loss_weight, group=world())(z1, z2)


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """Barlow Twins loss of two views [N, D], times ``scale_loss``.

    The rows of all processes are taken together, as if one process had them. In solo-learn each process normalises its
    own rows, and the correlations are averaged.

    Args:
        z1, z2: the two views.
        lamb: weight of the correlations off the diagonal.
        scale_loss: factor on the loss.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import barlow_loss_func
    >>> round(barlow_loss_func(torch.eye(4), torch.eye(4), scale_loss=1.0).item(), 4)
    0.0067
    """
    return scale_loss * K.barlow_twins_loss(z1, z2, lambda_param=lamb, group=world())


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo v3 loss in one direction, of ``query`` and frozen ``key`` [B, D], which are normalised here.

    The keys of all processes are taken together.

    Args:
        query, key: features of two views; ``key`` without gradient.
        temperature: divides the similarities.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import mocov3_loss_func
    >>> round(mocov3_loss_func(torch.eye(4), torch.eye(4)).item(), 4)
    0.008
    """
    return MoCoV3Loss(temperature, gather=True).one_direction(query, key)


class MomentumUpdater:
    """Replaces ``solo.utils.momentum.MomentumUpdater``, whose momentum rises along a cosine from base to final.

    Parameters are paired by their order, as in solo-learn, but networks that differ are refused. Buffers stay as they
    are; :class:`ssl_kernels.ModelEma` updates them too.

    Args:
        base_tau: momentum in [0, 1] until :meth:`update_tau` is called, and at step 0.
        final_tau: momentum at the last step, at least ``base_tau``.

    >>> import torch
    >>> from ssl_kernels.integrations.solo import MomentumUpdater
    >>> online, momentum = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(momentum.weight), torch.nn.init.ones_(online.weight)
    >>> updater = MomentumUpdater(base_tau=0.5, final_tau=1.0)
    >>> updater.update_tau(cur_step=50, max_steps=100)
    >>> updater.update(online, momentum)
    >>> updater.cur_tau, momentum.weight.item()
    (0.75, 0.25)
    """

    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        check_fraction("base_tau", base_tau)
        check_fraction("final_tau", final_tau)
        if base_tau > final_tau:
            raise ValueError(f"final_tau: expected at least base_tau ({base_tau}), got {final_tau}")
        self.base_tau = base_tau
        self.cur_tau = base_tau
        self.final_tau = final_tau

    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        """Move the parameters of ``momentum_net`` towards those of ``online_net``."""
        K.ema_update_(momentum_net.parameters(), online_net.parameters(), self.cur_tau)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """Set the momentum for step ``cur_step`` of ``max_steps``."""
        self.cur_tau = cosine_momentum(cur_step, max_steps, self.base_tau, self.final_tau)
