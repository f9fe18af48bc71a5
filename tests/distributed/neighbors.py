"""What each rank runs of KoLeo."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shards import Whole, shares
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ssl_kernels.functional as K
from ssl_kernels import KoLeoLoss, use_backend, use_workspace
from ssl_kernels.integrations import dinov3


def batch(counts: list[int], width: int = 6) -> Whole:
    """Rows of different lengths, so few features that one is the neighbour of several."""
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), width, generator=generator)
    return Whole([(x * torch.rand(len(x), 1, generator=generator).add(0.1)).double()], counts)


def losses_are_those_of_one_process(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for counts in shares(world, 2):
        whole = batch(counts)
        first, *others = [
            whole.check("koleo", K.koleo_loss, rank, group=group, strategy=strategy, grad_reduce=grad_reduce)
            for strategy, grad_reduce in (("gather", "mean"), ("ring", "mean"), ("ring", "sum"), ("gather", "mean"))
        ]
        for other in (others[0], others[2]):
            assert all(map(torch.equal, first, other)), counts
        whole.check("koleo", K.koleo_loss, rank, torch.float64, group=group)
        for backend in ("eager", "reference"):
            with use_backend(backend):
                whole.check("koleo", K.koleo_loss, rank, group=group)
        with use_workspace(0.0005):
            whole.check("koleo", K.koleo_loss, rank, group=group, strategy="ring")


def ties_hubs_and_options(rank: int, world: int) -> None:
    group = dist.group.WORLD
    counts = [6 + 3 * r for r in range(world)]
    rows = Whole([], counts).rows_of(rank)
    generator = torch.Generator().manual_seed(1)
    # Rows (3, 1, ..., 1) but for signs have the norm 4, and so exact products, and many equal ones: of these the first
    # is the neighbour, on any rank.
    signs = torch.randint(0, 2, (sum(counts), 8), generator=generator).double() * 2 - 1
    signs[::4] = signs[1]
    distinct = Whole([signs[torch.randperm(len(signs), generator=generator)]], counts)
    distinct.tensors[0][:, 0] *= 3
    expected = distinct.run(K.koleo_loss, torch.float64)
    shared = distinct.run(K.koleo_loss, torch.float64, rows, group=group)
    torch.testing.assert_close(shared[1] / world, expected[1][rows], rtol=1e-9, atol=1e-9)
    # One row, of rank 0, is the neighbour of all.
    hub = torch.eye(sum(counts), 40, dtype=torch.float64) + 2 * torch.eye(40, dtype=torch.float64)[39]
    hub[0] = torch.eye(40, dtype=torch.float64)[39]
    Whole([hub], counts).check("hub", K.koleo_loss, rank, group=group)
    whole = batch(counts)
    whole.check("sum", _sum, rank, group=group)
    whole.check("bf16", K.koleo_loss, rank, torch.bfloat16, group=group)
    batch([7] * world).check("even", K.koleo_loss, rank, group=group, even_batches=True)
    x = whole.tensors[0].float()
    expected = K.koleo_loss(x)
    torch.testing.assert_close(K.koleo_loss(x[rows], group=group), expected)
    torch.testing.assert_close(KoLeoLoss(gather_distributed=True)(x[rows]), expected)
    torch.testing.assert_close(KoLeoLoss(group=group)(x[rows]), expected)
    torch.testing.assert_close(dinov3.KoLeoLossDistributed()(x[rows]), expected)
    assert torch.equal(KoLeoLoss()(x[rows]), K.koleo_loss(x[rows]))
    alone = [dist.new_group([r]) for r in range(world)][rank]
    assert torch.equal(KoLeoLoss(group=alone)(x[rows]), K.koleo_loss(x[rows]))
    assert torch.equal(KoLeoLoss(group=alone)(x[:1]), KoLeoLoss()(x[:1]))
    leaf = x[:1].repeat(4, 1).requires_grad_()
    collapsed = K.koleo_loss(leaf, group=group)
    (gradient,) = torch.autograd.grad(collapsed, leaf)
    assert collapsed.isfinite()
    assert gradient.isfinite().all()
    for arguments, options, message in (
        ((x[:1] if rank == 0 else x[:0],), {}, "x: expected at least 2 rows, a row and its neighbour, got 1"),
        ((x[:3],), {"eps": 1e-8 * (1 + rank)}, "koleo_loss: eps: expected the same on all ranks, got 1e-08 on rank 0"),
        ((x[:3],), {"reduction": "none"}, "reduction: expected 'mean' or 'sum' over several processes, got 'none'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            K.koleo_loss(*arguments, group=group, **options)


def _sum(x: Tensor, **how: Any) -> Tensor:
    return K.koleo_loss(x, reduction="sum", **how)


def parts_of_the_world(rank: int, world: int) -> None:
    members = [2, 1]
    group = dist.new_group(members)
    if rank in members:
        batch([3, 9]).check("group", K.koleo_loss, dist.get_group_rank(group, rank), group=group)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("pp", "dp"))
    batch([3, 4, 5]).check("mesh", K.koleo_loss, rank, group=mesh["dp"])


def groups_of_dinov3(rank: int, world: int) -> None:
    """The mean over processes of the gradients is that of the mean over the groups."""
    assert world == 2
    whole = batch([8, 8])
    own = whole.rows_of(rank)
    for size, parts in ((16, [slice(0, 16)]), (8, [slice(0, 8), slice(8, 16)]), (None, [slice(0, 16)])):
        loss = dinov3.KoLeoLossDistributed(loss_group_size=size)
        x = whole.tensors[0].clone().requires_grad_()
        losses = torch.stack([K.koleo_loss(x[part]) for part in parts])
        (expected,) = torch.autograd.grad(losses.mean(), x)
        for _ in range(2):
            value, gradient = whole.run(loss, torch.float64, own)
            torch.testing.assert_close(gradient / world, expected[own])
            torch.testing.assert_close(value, losses[rank if len(parts) > 1 else 0].detach())
        assert len(loss._groups) == (size is not None)
    with pytest.raises(ValueError, match=r"loss_group_size: expected a multiple of the 8 rows .* of all, got 12"):
        dinov3.KoLeoLossDistributed(loss_group_size=12)(x[own])
    message = "KoLeoLossDistributed: rows: expected the same on all ranks, got 3 on rank 0; 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        dinov3.KoLeoLossDistributed(loss_group_size=8)(x[: 3 + rank])
