"""NT-Xent loss. A unit is 2 (2N)^2 D FLOP. Similarities are symmetric, so that the loss alone takes half a unit, and
gradients one and a half more, less half a unit for tiles that are kept within the budget."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import NTXentLoss
from ssl_kernels.bench.problem import Floor, Loss, NotComparableError, Op, Problem, gflop, pairs, peer, recomputing
from ssl_kernels.settings import tile_budget_bytes

TEMPERATURE = 0.1
PEER_LIMIT = 128  # pytorch-metric-learning compares every positive with every negative pair: 68 GB at a batch of 2,048


def eager(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    same = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.t() / TEMPERATURE).masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))


def metric_learning(batch: int) -> Loss:
    if batch > PEER_LIMIT:
        raise NotComparableError("too large")
    loss = pkgutil.resolve_name("pytorch_metric_learning.losses:NTXentLoss")(TEMPERATURE)
    return lambda z0, z1: loss(torch.cat([z0, z1]), torch.arange(len(z0)).repeat(2))


def problem(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    rows = 2 * batch

    def floor(provider: str, backward: bool) -> Floor:
        keeps = provider != "ours, recomputing" and device.type == "cpu"
        kept = min(1.0, tile_budget_bytes() / (2 * rows**2)) if keeps else 0.0
        return Floor((2 - kept / 2 if backward else 0.5) * gflop(rows, rows, width), width)

    providers: dict[str, Callable[[], Loss]] = {
        "ours": lambda: NTXentLoss(TEMPERATURE),
        "ours, recomputing": lambda: recomputing(NTXentLoss(TEMPERATURE)),
        "lightly": peer("lightly.loss:NTXentLoss", TEMPERATURE),
        "pytorch-metric-learning": functools.partial(metric_learning, batch),
    }
    return Problem(pairs(batch, width, dtype, device), eager, providers, floor)


NT_XENT = Op(
    "nt_xent",
    "NT-Xent",
    problem,
    ("ours", "ours, recomputing", "lightly", "pytorch-metric-learning", "eager", "compile"),
    [(2048, 128), (2048, 512)],
    tiny=[(32, 16)],
    sweep=[(2**k, 128) for k in range(8, 15)],
    gpu_shapes=[(4096, 128), (32_768, 512)],
    describe=lambda batch, width: f"2N={2 * batch} D={width}",
    quadratic=True,
    rows=lambda batch, width: 2 * batch,
)
