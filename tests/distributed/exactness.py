"""Run by each rank: peers' losses over several processes on the same rows as ours, and which of them are exact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightly.loss import NTXentLoss as LightlyNTXentLoss
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss, NTXentLoss, SigLipLoss

ROWS, WIDTH = 8, 16


def error(loss: Callable[..., Tensor], exact: list[Tensor], rank: int, world: int, scalars: int) -> float:
    """Of the gradients that the mean over the ranks gives the features and the scalars, the largest, relative."""
    leaves = [*(t.float() for t in features(rank)), torch.tensor(14.0), torch.tensor(-3.0)][: 2 + scalars]
    leaves = [t.clone().requires_grad_() for t in leaves]
    found = torch.autograd.grad(loss(*leaves), leaves)
    errors = []
    for gradient, truth in zip(found, exact, strict=True):
        truth = truth if truth.dim() == 0 else truth[rank * ROWS : (rank + 1) * ROWS]
        mean = gradient.clone()
        if truth.dim() == 0:
            dist.all_reduce(mean)
        errors.append(((mean / world - truth).abs().max() / truth.abs().max()).item())
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def features(rank: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = [F.normalize(torch.randn(4 * ROWS, WIDTH, generator=generator, dtype=torch.float64), dim=1) for _ in "xy"]
    rows = slice(dist.get_world_size() * ROWS) if rank is None else slice(rank * ROWS, (rank + 1) * ROWS)
    return [t[rows].clone() for t in whole]


def exact(loss: Callable[..., Tensor], scalars: int) -> list[Tensor]:
    leaves = [*features(), torch.tensor(14.0).double(), torch.tensor(-3.0).double()][: 2 + scalars]
    leaves = [t.requires_grad_() for t in leaves]
    return list(torch.autograd.grad(loss(*leaves), leaves))


def which_are_exact(rank: int, world: int) -> dict[str, float]:
    """The largest relative error of each way."""
    told: dict[str, Any] = {"rank": rank, "world_size": world}
    found: dict[str, float] = {}
    truth = exact(K.clip_loss, 1)
    flags = [{"local_loss": local, "gather_with_grad": grad} for local in (False, True) for grad in (False, True)]
    for flag in flags:
        name = ", ".join(f"{key}={value}" for key, value in flag.items())
        for whose, kind in (("open_clip", open_clip.loss.ClipLoss), ("ours", ClipLoss)):
            found[f"ClipLoss({name}) {whose}"] = error(kind(**flag, **told), truth, rank, world, 1)
    truth = exact(K.sigmoid_contrastive_loss, 2)
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        for whose, kind in (("open_clip", open_clip.loss.SigLipLoss), ("ours", SigLipLoss)):
            found[f"SigLipLoss({dist_impl}) {whose}"] = error(kind(dist_impl=dist_impl, **told), truth, rank, world, 2)
    truth = exact(lambda *views: K.nt_xent_loss(*views, 0.5), 0)
    for whose, kind in (("lightly", LightlyNTXentLoss), ("ours", NTXentLoss)):
        found[f"NTXentLoss(gather_distributed=True) {whose}"] = error(
            kind(gather_distributed=True), truth, rank, world, 0
        )
    return found


def local_losses_are_open_clip_s(rank: int, world: int) -> None:
    """Each rank's value, with and without ``gather_with_grad``; where open_clip has all of the gradient, that too."""
    values = []
    for flags in ({"gather_with_grad": True}, {"gather_with_grad": False}):
        results = []
        for kind in (ClipLoss, open_clip.loss.ClipLoss):
            leaves = [t.float().requires_grad_() for t in (*features(rank), torch.tensor(14.0))]
            loss = kind(local_loss=True, rank=rank, world_size=world, **flags)(*leaves)
            gradients = list(torch.autograd.grad(loss, leaves))
            dist.all_reduce(gradients[-1])  # a rank's part of it is another one
            results.append([loss, *gradients] if flags["gather_with_grad"] else [loss])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        values.append(results[0][0])
    assert torch.equal(*values)
    mean = values[0].detach().clone()
    dist.all_reduce(mean)
    assert abs(mean / world - values[0]) > 1e-3  # a share is not the loss


def ours_are_exact(rank: int, world: int) -> None:
    found = which_are_exact(rank, world)
    if rank == 0:
        print(*(f"{name}: {value:.1e}" for name, value in found.items()), sep="\n", file=sys.stderr)
    assert all(value < 1e-6 for name, value in found.items() if name.endswith("ours")), found
    inexact = {name for name, value in found.items() if value > 2e-6}
    assert inexact == {
        "ClipLoss(local_loss=False, gather_with_grad=False) open_clip",
        "ClipLoss(local_loss=True, gather_with_grad=False) open_clip",
    }, found
