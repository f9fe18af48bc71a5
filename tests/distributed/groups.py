"""What each of three ranks runs of queues, centres and assignments that parts of the world hold in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ssl_kernels.functional as K
from ssl_kernels import DINOLoss, IBOTPatchLoss, KeyQueue, MoCoLoss, SinkhornKnopp, use_backend
from ssl_kernels.losses.center import Center
from ssl_kernels.queue import gather_rows


def parts(rank: int) -> Iterator[tuple[Any, list[int]]]:
    """A group, as a loss takes it, and its ranks in their order."""
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("pp", "dp"))
    yield mesh["dp"], [0, 1, 2]
    yield mesh["pp"], [rank]
    yield dist.group.WORLD, [0, 1, 2]
    yield None, [0, 1, 2]
    swapped, single = dist.new_group([2, 1]), dist.new_group([0])
    members = [1, 2] if rank in (1, 2) else [0]
    yield swapped if rank in (1, 2) else single, members


def shards(rank: int, members: list[int], counts: list[int]) -> tuple[slice, int]:
    """Of a batch of these members: the rows of this rank, and how many there are."""
    here = members.index(rank)
    mine = [counts[member] for member in members]
    return slice(sum(mine[:here]), sum(mine[: here + 1])), sum(mine)


def what_processes_share_is_that_of_one(rank: int, world: int) -> None:
    assert world == 3
    torch.manual_seed(0)
    everyone = torch.randn(40, 12)
    for group, members in parts(rank):
        for counts in ([3, 3, 3], [5, 2, 4], [0, 3, 0], [0, 0, 0]):
            rows, total = shards(rank, members, counts)
            whole, own = everyone[:total], everyone[:total][rows]
            assert torch.equal(gather_rows(own, group), whole)
            _queue(group, whole, own)
            _centers(group, whole, own)
            for backend in ("cpu", "eager", "reference"):
                with use_backend(backend):
                    center = SinkhornKnopp(group=group).center(own, 0.5)
                torch.testing.assert_close(center, _assigned(whole, 0.5), rtol=1e-4, atol=1e-5)


def _queue(group: Any, whole: Tensor, own: Tensor) -> None:
    shared, alone = (
        KeyQueue(9, 12, gather=gather, group=of, generator=torch.Generator().manual_seed(0))
        for gather, of in ((True, group), (False, None))
    )
    for _ in range(2):
        shared.enqueue(own.clone().requires_grad_())
        alone.enqueue(whole)
    assert torch.equal(shared.keys, alone.keys)
    assert torch.equal(shared.pointer, alone.pointer)
    if len(own):
        MoCoLoss()(own, own, KeyQueue(9, 12), update=False)


def _centers(group: Any, whole: Tensor, own: Tensor) -> None:
    expected = 0.1 * whole.mean(0) if len(whole) else torch.zeros(12)
    center = Center((1, 12), group=group)
    center.update(own)
    dino, ibot = DINOLoss(12, group=group), IBOTPatchLoss(12, group=group)
    crops = own[None].expand(2, *own.shape)
    loss = dino(crops, crops)
    patches = ibot(own, own, torch.ones(1, len(own), 1, dtype=torch.bool))
    for found in (center.value, dino.center, ibot.center.center):
        torch.testing.assert_close(found.flatten(), expected)
    if len(own):
        torch.testing.assert_close(loss, K.dino_loss(crops, crops, teacher_temp=0.04))
        assert patches.isfinite()


def _assigned(teacher: Tensor, temperature: float) -> Tensor:
    """By one process, as Sinkhorn-Knopp is written."""
    if len(teacher) == 0:
        return torch.zeros(teacher.shape[1])
    z, u = teacher.double() / temperature, torch.zeros(len(teacher), 1, dtype=torch.float64)
    for _ in range(3):
        v = (z - u).logsumexp(0)
        u = (z - v).logsumexp(1, keepdim=True)
    return (temperature * v).float()
