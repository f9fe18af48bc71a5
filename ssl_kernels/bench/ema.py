"""The update of a momentum teacher: beside Meta's loops, lightly's, timm's, torch's.

The floor is to read both models and to write the teacher: 12 bytes per parameter in float32, 10 from a bfloat16
student. A loop over parameters goes through them two or three times.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.bench.problem import Floor, Loss, Op, Problem, normal

MOMENTUM = 0.996
Update = Callable[[], Any]


class Parameters(nn.Module):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(tensor.clone(), requires_grad=False) for tensor in tensors)


def vit(depth: int, width: int) -> list[tuple[int, ...]]:
    """Parameters of a vision transformer."""
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    norm = [(width,), (width,)]
    block: list[tuple[int, ...]] = [*norm, *attention, *norm, *mlp]
    return [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,), *block * depth, *norm]


DINO_HEAD = [(2048, 384), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (65536, 256)]
MODELS: dict[str, list[tuple[int, ...]]] = {
    "ViT-S + DINO head": [*vit(12, 384), *DINO_HEAD],  # 22 million parameters, and as many
    "5,000 of 64": [(64,)] * 5000,
    "ViT 24 x 1024": vit(24, 1024),
    "3 parameters": [(16, 3), (16,), (7,)],
}


def dino(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * source.detach().data)


def loop(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)


def foreach_lerp(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets[0].dtype != sources[0].dtype:
        sources = [source.to(targets[0].dtype) for source in sources]
    torch._foreach_lerp_(list(targets), list(sources), 1 - MOMENTUM)


def of_lists(update: Callable[[Sequence[Tensor], Sequence[Tensor]], Any]) -> Callable[[nn.Module, nn.Module], Update]:
    def make(teacher: nn.Module, student: nn.Module) -> Update:
        targets, sources = list(teacher.parameters()), list(student.parameters())
        return lambda: update(targets, sources)

    return make


def lightly(teacher: nn.Module, student: nn.Module) -> Update:
    update = pkgutil.resolve_name("lightly.models.utils:update_momentum")
    return lambda: update(student, teacher, MOMENTUM)


def timm(teacher: nn.Module, student: nn.Module) -> Update:
    average = pkgutil.resolve_name("timm.utils:ModelEmaV3")(teacher, decay=MOMENTUM)
    average.module = teacher
    return lambda: average.update(student)


UPDATES = {
    "ours": of_lists(lambda targets, sources: K.ema_update_(targets, sources, MOMENTUM)),
    "dino": of_lists(dino),
    "loop": of_lists(loop),
    "lightly": lightly,
    "timm": timm,
    "foreach_lerp": of_lists(foreach_lerp),
}


def problem(model: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """Teachers in float32, students in ``dtype``."""
    start, other = (
        [normal(*shape, dtype=torch.float32, device=device, seed=2 * k + seed) for k, shape in enumerate(MODELS[model])]
        for seed in range(2)
    )
    student = Parameters([tensor.to(dtype) for tensor in other])

    def provider(make: Callable[[nn.Module, nn.Module], Update]) -> Loss:
        teacher = Parameters(start)
        targets, update = list(teacher.parameters()), make(teacher, student)

        def step() -> Sequence[Tensor]:
            update()
            return targets

        return step

    def formula() -> list[Tensor]:
        kept = MOMENTUM**2
        return [kept * t.double() + (1 - kept) * s.double() for t, s in zip(start, student.parameters(), strict=True)]

    moved = sum(tensor.numel() for tensor in start) * (8 + dtype.itemsize) / 1e9
    providers = {name: functools.partial(provider, make) for name, make in UPDATES.items()}
    return Problem([], formula, providers, lambda provider, backward: Floor(gbytes=moved))


EMA = Op(
    "ema",
    "Momentum update",
    problem,
    tuple(UPDATES),
    [("ViT-S + DINO head",), ("5,000 of 64",)],
    tiny=[("3 parameters",)],
    gpu_shapes=[("ViT 24 x 1024",)],
    describe="{}".format,
    suffix=", float32 student",
    label="fp32",
    modes=("update",),
    tolerance=1e-6,
)
EMA_16_BITS = replace(
    EMA,
    suffix=", bfloat16 student",
    label="bf16",
    dtype=torch.bfloat16,
    tolerance=5e-5,  # some round (1 - m) times a student to bfloat16, twice
)
