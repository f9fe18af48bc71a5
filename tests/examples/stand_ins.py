"""Peers whose code the tests do not install, by the formulas of their papers and with the calls of their code.

Where a checkout of the peer is on the path (`PYTHONPATH`), its own code takes their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from distillation import assignment
from torch import Tensor, nn


def cross_entropy(p: Tensor, logits: Tensor, temperature: float = 0.1) -> Tensor:
    return -(p * (logits / temperature).log_softmax(-1)).sum(-1)


# ---- DINO, DINOv2 and DINOv3


class DINOLossOfMain:
    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
    ) -> None:
        warmup = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs).tolist()
        self.temperatures = warmup + [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)
        self.crops, self.center = ncrops, torch.zeros(1, out_dim)

    def __call__(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        teacher = ((teacher_output - self.center) / self.temperatures[epoch]).softmax(-1).chunk(2)
        student = student_output.chunk(self.crops)
        terms = [cross_entropy(p, s).mean() for t, p in enumerate(teacher) for v, s in enumerate(student) if t != v]
        self.center = 0.9 * self.center + 0.1 * teacher_output.mean(0, keepdim=True)
        return torch.stack(terms).mean()


class Teacher:
    def __init__(self, out_dim: int) -> None:
        pass

    def sinkhorn_knopp_teacher(
        self, logits: Tensor, teacher_temp: float, n_masked_patches_tensor: Any = None
    ) -> Tensor:
        return assignment(logits, teacher_temp).float()


class DINOLossOfV2(Teacher):
    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        return torch.stack([cross_entropy(p, s).mean() for s in student for p in teacher]).sum()


class DINOLossOfV3(Teacher):
    def __call__(self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False) -> Tensor:
        terms = cross_entropy(teacher_probs[:, None], student_logits[None]).mean(-1)  # [T, V]
        return terms[~torch.eye(*terms.shape, dtype=torch.bool)].mean() if ignore_diagonal else terms.mean()


class IBOTPatchLoss(Teacher):
    def forward_masked(self, student: Tensor, teacher: Tensor, student_masks_flat: Tensor) -> Tensor:
        images = student_masks_flat.nonzero()[:, 0]
        return (cross_entropy(teacher, student) / student_masks_flat.sum(1)[images]).sum() / len(student_masks_flat)


class KoLeoLoss:
    def __call__(self, rows: Tensor) -> Tensor:
        unit = F.normalize(rows, dim=1)
        nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
        return -((unit - unit[nearest] + 1e-8).norm(dim=1) + 1e-8).log().mean()


# ---- solo-learn


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    logits = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / temperature).fill_diagonal_(-torch.inf)
    positive = (indexes[:, None] == indexes).fill_diagonal_(False)
    return -logits.log_softmax(1)[positive].mean()


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1) / temperature
    return -logits.log_softmax(1)[:, 0].mean()


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    return -2 * temperature * logits.log_softmax(1).diagonal().mean()


def vicreg_loss_func(
    z1: Tensor, z2: Tensor, sim_loss_weight: float = 25.0, var_loss_weight: float = 25.0, cov_loss_weight: float = 1.0
) -> Tensor:
    loss = sim_loss_weight * (z1 - z2).square().mean()
    for z in (z1, z2):
        covariance = z.T.cov()
        loss = loss + var_loss_weight * (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()
        loss = loss + cov_loss_weight * (covariance - covariance.diag().diag()).square().sum() / z.shape[1]
    return loss


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    first, second = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    correlation = first.T @ second / len(z1)
    weight = torch.full_like(correlation, lamb).fill_diagonal_(1)
    return scale_loss * (weight * (correlation - torch.eye(len(correlation))).square()).sum()


class MomentumUpdater:
    def __init__(self, base_tau: float, final_tau: float) -> None:
        self.base, self.final, self.tau = base_tau, final_tau, base_tau

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: nn.Module) -> None:
        for average, parameter in zip(momentum.parameters(), online.parameters(), strict=True):
            average.copy_(self.tau * average + (1 - self.tau) * parameter)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        rest = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.tau = self.final - (self.final - self.base) * rest


MODULES = {
    "main_dino": SimpleNamespace(DINOLoss=DINOLossOfMain),
    "dinov2": SimpleNamespace(),
    "dinov2.loss": SimpleNamespace(DINOLoss=DINOLossOfV2, iBOTPatchLoss=IBOTPatchLoss, KoLeoLoss=KoLeoLoss),
    "dinov3": SimpleNamespace(),
    "dinov3.loss": SimpleNamespace(DINOLoss=DINOLossOfV3, iBOTPatchLoss=IBOTPatchLoss, KoLeoLoss=KoLeoLoss),
    "solo": SimpleNamespace(),
    "solo.losses": SimpleNamespace(),
    "solo.losses.barlow": SimpleNamespace(barlow_loss_func=barlow_loss_func),
    "solo.losses.mocov2plus": SimpleNamespace(mocov2plus_loss_func=mocov2plus_loss_func),
    "solo.losses.mocov3": SimpleNamespace(mocov3_loss_func=mocov3_loss_func),
    "solo.losses.simclr": SimpleNamespace(simclr_loss_func=simclr_loss_func),
    "solo.losses.vicreg": SimpleNamespace(vicreg_loss_func=vicreg_loss_func),
    "solo.utils": SimpleNamespace(),
    "solo.utils.momentum": SimpleNamespace(MomentumUpdater=MomentumUpdater),
}
