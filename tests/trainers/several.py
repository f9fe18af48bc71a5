"""What the processes of test_torchrun.py do, and runs that draw nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ssl_kernels.trainers import batch_norm, train_images, training, two_towers
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data import images
from ssl_kernels.trainers.data.identity import ids_of_keys
from ssl_kernels.trainers.dino_config import DINOConfig
from ssl_kernels.trainers.evaluation import curves, features, retrieval
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.processes import Share


def train(rank: int, world: int, folder: Path) -> None:
    """The runs of `folder`/jobs.json, as under torchrun; what a run returns is written beside it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    for name, (trainer, arguments, stop) in json.loads((folder / "jobs.json").read_text()).items():
        with (folder / f"stdout of rank {rank}").open("a") as file, contextlib.redirect_stdout(file):
            code = run(trainer, [*arguments, "--output-dir", str(folder / name)], stop)
        (folder / f"{name} on {rank}").write_text(str(code))


def run(trainer: str, arguments: list[str], stop: int = 0) -> int:
    """A trainer's exit code; it is not evaluated, and in the step `stop` the first process has a signal."""
    module = importlib.import_module(f"ssl_kernels.trainers.{trainer}")
    optimizer_step = training.Training.optimizer_step

    def signalled(self: training.Training, batches: object) -> dict[str, float]:
        metrics = optimizer_step(self, batches)  # type: ignore[arg-type]
        if self.config.strategy == "fsdp":
            check_shards(self.inner, self.optimizer)
        if self.done == stop and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), 15)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_empty(patch)
        patch.setattr(train_images, "evaluate", check_evaluated)
        patch.setattr(two_towers, "CHECKED", 6)  # of 8, four of which the first of two processes has
        patch.setattr(images, "_SAMPLE", 0)  # files that are tried before training: of so few it would be all
        patch.setattr(training.Training, "optimizer_step", signalled)
        code: int = module.main(arguments)
    return code


def leave_pictures_empty(patch: pytest.MonkeyPatch) -> None:
    """Of what a run draws it leaves files without content."""
    for module, name in ((curves, "plot_curves"), (retrieval, "plot_retrieval"), (features, "plot_features")):
        plot = getattr(module, name)
        expected = inspect.signature(plot)

        @functools.wraps(plot)
        def touch(*arguments: object, expected: inspect.Signature = expected, **options: object) -> str:
            expected.bind(*arguments, **options).arguments["path"].touch()
            return ""

        patch.setattr(module, name, touch)


def check_evaluated(
    _: object, trained: nn.Module, _initial: object, _data: object, config: LoopConfig, _stages: object
) -> list[Any]:
    """What would be evaluated is what was saved at the end."""
    saved = load_checkpoint(config.output_dir / "last.pt")["model"]
    prefix = "teacher.module." if isinstance(config, DINOConfig) else "encoder."
    assert all(torch.equal(value, saved[prefix + name]) for name, value in trained.state_dict().items())
    return []


def check_shards(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A process holds its share of everything, but for what does not split evenly; blocks are gathered one by one."""
    averages = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    tensors = [*module.parameters(), *averages]
    assert all(isinstance(tensor, DTensor) for tensor in tensors)
    held = sum(tensor.to_local().numel() for tensor in tensors)  # type: ignore[attr-defined]
    assert len(averages) >= 2
    assert held * dist.get_world_size() <= 1.02 * sum(tensor.numel() for tensor in tensors)
    assert sum(isinstance(part, FSDPModule) for part in module.modules()) > 3


def batch_norm_is_that_of_one_process(rank: int, world: int) -> None:
    """Uneven and empty parts, over all processes and over one; against torch's on the whole batch, in float64."""
    generator = torch.Generator().manual_seed(0)
    for rows, shape in (([5, 3], (4, 2, 3)), ([0, 6], (4,)), ([4, 4], (4, 5))):
        x = torch.randn(sum(rows), *shape, generator=generator, dtype=torch.float64)
        weights = torch.randn(*x.shape, generator=generator, dtype=torch.float64)
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)]
        whole, parts = (nn.Sequential(kind(4, momentum=None if rows == [5, 3] else 0.1).double()) for _ in range(2))
        batch_norm.synchronise(parts, torch.device("cpu"))
        own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        for _ in range(2):
            expected = results(whole, x, weights)
            found = results(parts, x[own], weights[own])
        assert torch.allclose(found[0], expected[0][own], rtol=1e-12)
        assert torch.allclose(found[1], expected[1][own], rtol=1e-10, atol=1e-12)
        for gradient, total in zip(found[2:], expected[2:], strict=True):
            dist.all_reduce(gradient)
            assert torch.allclose(gradient, total, rtol=1e-12)
        for name, value in whole.state_dict().items():
            assert torch.allclose(parts.state_dict()[name].double(), value.double(), rtol=1e-12), name
        assert torch.allclose(parts.eval()(x), whole.eval()(x), rtol=1e-12)


def results(net: nn.Sequential, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Value and gradients of a layer."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = net(x)
    (y.sin() * weights).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def statistics_are_averaged(rank: int, world: int) -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(1, track_running_stats=False))
    net[0].running_mean.fill_(rank)  # type: ignore[operator, union-attr]
    batch_norm.average_statistics(net)
    assert net[0].running_mean.tolist() == [0.5, 0.5]  # type: ignore[operator, union-attr]
    assert net[0].running_var.tolist() == [1, 1]  # type: ignore[operator, union-attr]


def keys_are_linked(rank: int, world: int) -> None:
    """By a caption here and there, or an image; and all processes agree that there is nothing to link."""
    keys = torch.tensor([[1, 10], [2, 20], [3, 20], [4, 10]])[Share(rank, world).of(4)]
    ids = ids_of_keys(keys)
    assert ids is not None
    everyones = [torch.empty_like(ids) for _ in range(world)]
    dist.all_gather(everyones, ids)
    a, b, c, d = torch.cat(everyones).tolist()
    assert a == d != b == c
    assert ids_of_keys(torch.tensor([[rank, rank]])) is None
