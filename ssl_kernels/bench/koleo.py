"""KoLeo. Similarities are symmetric, so that half a unit (2 B^2 D FLOP) is all that has to be multiplied, with or
without gradients; the others multiply a whole one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import KoLeoLoss
from ssl_kernels.bench.problem import Floor, Op, Problem, gflop, normal, peer

EPS = 1e-8


def eager(x: Tensor) -> Tensor:
    u = F.normalize(x, dim=1, eps=EPS)
    with torch.no_grad():
        neighbor = (u @ u.t()).fill_diagonal_(-2).argmax(1)
    return -torch.log(F.pairwise_distance(u, u[neighbor], 2, EPS) + EPS).mean()


def problem(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def floor(provider: str, backward: bool) -> Floor:
        return Floor(gflop(batch, batch, width) / 2, width)

    x = normal(batch, width, dtype=dtype, device=device)
    return Problem([x.requires_grad_()], eager, {"ours": KoLeoLoss, "lightly": peer("lightly.loss:KoLeoLoss")}, floor)


KOLEO = Op(
    "koleo",
    "KoLeo",
    problem,
    ("ours", "lightly", "eager", "compile"),
    [(8192, 384), (512, 384), (8192, 1024)],
    tiny=[(48, 16)],
)
