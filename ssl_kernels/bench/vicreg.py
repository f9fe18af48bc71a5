"""VICReg and Barlow Twins. A unit is 2 n D^2 FLOP, or 2 n^2 D where the squares are taken through the rows (2 n <= D).

VICReg takes one for each view and one more for each gradient; Barlow Twins one and two more, or two and two more
through the rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import BarlowTwinsLoss, VICRegLoss
from ssl_kernels.bench.problem import Floor, Loss, Op, Problem, gflop, normal, peer


def eager_vicreg(za: Tensor, zb: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(za, zb)
    for z in (za, zb):
        c = z - z.mean(0)
        covariance = c.t() @ c / (len(z) - 1)
        variance = covariance.diagonal()
        squares = (covariance.square().sum() - variance.square().sum()) / z.shape[1]
        loss = loss + 12.5 * F.relu(1 - torch.sqrt(variance + 1e-4)).mean() + squares
    return loss


def eager_barlow_twins(za: Tensor, zb: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (za, zb))
    correlation = a.t() @ b / len(a)
    diagonal = correlation.diagonal()
    return (diagonal - 1).square().sum() + 5e-3 * (correlation.square().sum() - diagonal.square().sum())


def problem(formula: Loss, ours: type, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    by_rows = 2 * batch <= width

    def floor(provider: str, backward: bool) -> Floor:
        products = (2 if ours is VICRegLoss or by_rows else 1) + (2 if backward else 0)
        return Floor(products * gflop(batch, width, batch if by_rows else width), min(batch, width))

    views = [normal(batch, width, dtype=dtype, device=device, seed=k).requires_grad_() for k in range(2)]
    return Problem(views, formula, {"ours": ours, "lightly": peer(f"lightly.loss:{ours.__name__}")}, floor)


VICREG = Op(
    "vicreg",
    "VICReg",
    partial(problem, eager_vicreg, VICRegLoss),
    ("ours", "lightly", "eager", "compile"),
    [(256, 2048), (2048, 2048), (256, 4096)],
    tiny=[(16, 64)],
    describe="n={} D={}".format,
)
BARLOW_TWINS = replace(
    VICREG,
    name="barlow_twins",
    title="Barlow Twins",
    problem=partial(problem, eager_barlow_twins, BarlowTwinsLoss),
)
