"""Run by each rank: losses of retrieval over several processes, against those that their peers gather."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.integrations.retrieval import DistributedContrastiveLoss, EmbedderLoss, TwoTowerLoss

ROWS, COUNT, WIDTH = 6, 3, 8


def gathered(own: Tensor) -> Tensor:
    """Of all ranks, with gradients to one's own: as Tevatron and FlagEmbedding gather."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def peer(q: Tensor, p: Tensor) -> Tensor:
    q, p = gathered(q), gathered(p)
    return F.cross_entropy(q @ p.t(), COUNT * torch.arange(len(q)))


def as_the_peers_gather(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    rows = (torch.randn(n, WIDTH, generator=generator) for n in (ROWS, COUNT * ROWS))
    q, p = (F.normalize(t, dim=1).requires_grad_() for t in rows)
    teacher = torch.rand(ROWS, COUNT, generator=generator).softmax(1)
    loss = peer(q / 0.1, p)
    theirs = [loss, *torch.autograd.grad(loss, (q, p))]
    own = torch.einsum("qd,qcd->qc", q, p.view(ROWS, COUNT, WIDTH)) / 0.1
    taught = -(own.log_softmax(1) * teacher).sum(1).mean()
    taught = [taught, *torch.autograd.grad(taught, (q, p))]
    for module, value, gradient, by_teacher in (
        (DistributedContrastiveLoss(), world, world, None),  # Tevatron
        (DistributedContrastiveLoss(scale_loss=False, group=dist.group.WORLD), 1, 1, None),
        (EmbedderLoss(0.1, True, grad_reduce="sum"), 1, 1, teacher),  # FlagEmbedding
        (EmbedderLoss(0.1, True, strategy="ring"), 1, world, teacher),  # exact
    ):
        is_tevatron = isinstance(module, DistributedContrastiveLoss)
        loss = module(q / 0.1, p) if is_tevatron else module(q, p, by_teacher)
        ours = [loss, *torch.autograd.grad(loss, (q, p))]
        for a, b, c, factor in zip(ours, theirs, taught, (value, gradient, gradient), strict=True):
            torch.testing.assert_close(a, factor * b + (0 if is_tevatron else c), rtol=2e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="kd_loss_type: 'm3_kd_loss' is not implemented over several"):
        EmbedderLoss(0.1, True, "m3_kd_loss")(q, p, teacher)


def two_towers_share_a_batch(rank: int, world: int) -> None:
    """Uneven, with sampled items, against one process that has all rows."""
    generator = torch.Generator().manual_seed(0)
    counts, sampled = [4 + 3 * r for r in range(world)], [5 - 2 * r for r in range(world)]
    users, items, more = (
        torch.randn(sum(n), WIDTH, generator=generator).double().requires_grad_() for n in (counts, counts, sampled)
    )
    ids, more_ids = (torch.randint(6, (sum(n),), generator=generator) for n in (counts, sampled))
    log_q, more_log_q = ids * 0.1, more_ids * 0.2
    given = {"log_q": log_q, "negatives": more, "negative_ids": more_ids, "negative_log_q": more_log_q}
    exact = TwoTowerLoss()(users, items, ids, **given)
    gradients = torch.autograd.grad(exact, (users, items, more))
    part = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    other = slice(sum(sampled[:rank]), sum(sampled[: rank + 1]))
    own = [t[s].detach().requires_grad_() for t, s in ((users, part), (items, part), (more, other))]
    given = {"log_q": log_q[part], "negatives": own[2], "negative_ids": more_ids[other]}
    given["negative_log_q"] = more_log_q[other]
    loss = TwoTowerLoss(group=dist.group.WORLD)(*own[:2], ids[part], **given)
    torch.testing.assert_close(loss, exact)
    for a, b, s in zip(torch.autograd.grad(loss, own), gradients, (part, part, other), strict=True):
        torch.testing.assert_close(a, world * b[s])
