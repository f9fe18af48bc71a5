"""What each of several ranks runs: steps in chunks through wrapped models, against one process with the whole batch."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ssl_kernels.functional as K
from ssl_kernels import grad_cache

COUNTS = [13, 8]  # chunks of 5: three, and two


class Model(nn.Module):
    """As open_clip's; with ``text`` alone, one of the towers of a model whose parts meet in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 5)).eval()
        self.text = nn.Embedding(11, 5)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> Any:
        x = None if images is None else F.normalize(self.image(images), dim=-1)
        y = None if tokens is None else F.normalize(self.text(tokens).mean(1), dim=-1)
        return (x, y, self.log_scale.exp()) if x is not None and y is not None else y if x is None else x


def whole_and_part(rank: int, counts: list[int] = COUNTS) -> tuple[Model, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Model()
    images, tokens = torch.randn(sum(counts), 6), torch.randint(0, 11, (sum(counts), 7))
    return model, (images, tokens), (images.split(counts)[rank], tokens.split(counts)[rank])


def counting(wrapper: DistributedDataParallel) -> list[int]:
    """Grows with each bucket of gradients that is sent."""
    sent = list[int]()

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.index())
        return (
            dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    wrapper.register_comm_hook(None, hook)
    return sent


def assert_gradients(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    for parameter, exact in zip(found.parameters(), expected.parameters(), strict=True):
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(gradient, exact.grad, rtol=1e-5, atol=tolerance * exact.grad.abs().max().item())


def ddp_with_one_tower(rank: int) -> None:
    """Two steps, the buckets being built anew after the first; then one of two batches, without a reduction between."""
    model, whole, part = whole_and_part(rank)
    K.clip_loss(*model(*whole)).backward()
    wrapper = DistributedDataParallel(copy.deepcopy(model))
    sent = counting(wrapper)

    def step() -> None:
        ((x, y, scale),) = grad_cache([wrapper], [part], 5)
        K.clip_loss(x, y, scale, group=dist.group.WORLD).backward()

    for steps in (1, 2):
        wrapper.zero_grad()
        step()
        assert len(sent) == steps
        assert_gradients(wrapper, model)
    wrapper.zero_grad()
    with wrapper.no_sync():
        step()
    assert len(sent) == 2
    step()
    assert len(sent) == 3
    for parameter in model.parameters():
        parameter.grad *= 2
    assert_gradients(wrapper, model)


def ddp_with_two_towers(rank: int) -> None:
    """One model called for each side, and a scale that is in no model."""
    model, whole, part = whole_and_part(rank)
    model.log_scale.requires_grad_(False)
    K.clip_loss(model(whole[0]), model(None, whole[1]), 5.0).backward()
    wrapper = DistributedDataParallel(copy.deepcopy(model))
    sent = counting(wrapper)
    model.log_scale.grad = None
    for steps in (1, 2):
        wrapper.zero_grad()
        x, y = grad_cache([wrapper, wrapper], [part[0], {"tokens": part[1]}], (5, 100))
        K.clip_loss(x, y, 5.0, group=dist.group.WORLD).backward()
        assert len(sent) == steps
        trained = nn.ModuleList([wrapper.module.image, wrapper.module.text])
        assert_gradients(trained, nn.ModuleList([model.image, model.text]))


def ddp_of_each_tower(rank: int) -> None:
    model, whole, part = whole_and_part(rank)
    image, text = model.image, nn.Sequential(model.text, nn.Flatten())
    K.nt_xent_loss(image(whole[0]), text(whole[1][:, :1]), 0.2).backward()
    wrappers = [DistributedDataParallel(copy.deepcopy(tower)) for tower in (image, text)]
    sent = [counting(wrapper) for wrapper in wrappers]
    z = grad_cache(wrappers, [part[0], part[1][:, :1]], 5)
    K.nt_xent_loss(*z, 0.2, group=dist.group.WORLD).backward()
    assert [len(buckets) for buckets in sent] == [1, 1]
    assert_gradients(nn.ModuleList([wrapper.module for wrapper in wrappers]), nn.ModuleList([image, text]))


def a_scale_that_is_taken_elsewhere(rank: int) -> None:
    model, _, part = whole_and_part(rank)
    wrapper = DistributedDataParallel(model)
    x, y = grad_cache([wrapper, wrapper], [part[0], {"tokens": part[1]}], 5)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel waits .* must be returned by a tower"):
        K.clip_loss(x, y, model.log_scale.exp(), group=dist.group.WORLD).backward()


def fsdp(rank: int) -> None:
    """Its ranks gather parameters in every forward pass, so they have equal numbers of chunks."""
    model, whole, part = whole_and_part(rank, [13, 11])
    model.log_scale = nn.Parameter(model.log_scale.detach()[None])
    x, y, scale = model(*whole)
    K.clip_loss(x, y, scale.squeeze()).backward()
    shards = copy.deepcopy(model)
    shards.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shard in (shards.image[-1], shards.image, shards):
        fully_shard(shard, mesh=mesh)
    for autocast in (False, False, True):
        shards.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ((x, y, scale),) = grad_cache([shards], [part], 5)
        K.clip_loss(x.float(), y, scale.squeeze(), group=dist.group.WORLD).backward()
        assert_gradients(shards, model, 2e-2 if autocast else 1e-6)


def check(rank: int, world: int) -> None:
    assert world == len(COUNTS)
    for case in (
        ddp_with_one_tower, ddp_with_two_towers, ddp_of_each_tower, a_scale_that_is_taken_elsewhere, fsdp
    ):  # fmt: skip
        case(rank)
