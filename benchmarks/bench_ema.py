"""The update of a momentum teacher: ours, Meta's loops, lightly's, timm's, torch's; in one run.

The floor is to read both models and to write the teacher: 12 bytes per parameter in float32, 10 from a bfloat16
student. A loop over parameters goes through them two or three times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine import copy_gbytes_per_s
from memory import peak_mb
from torch import Tensor, nn

import ssl_kernels.functional as K

MOMENTUM = 0.996
Step = Callable[[], Any]


class Parameters(nn.Module):
    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(tensor.clone(), requires_grad=False) for tensor in tensors)


def vit_small_with_dino_head() -> list[tuple[int, ...]]:
    """22 million parameters of a ViT-S/16, and as many of a head with 65,536 prototypes."""
    attention = [(1152, 384), (1152,), (384, 384), (384,)]
    mlp = [(1536, 384), (1536,), (384, 1536), (384,)]
    norm = [(384,), (384,)]
    block: list[tuple[int, ...]] = [*norm, *attention, *norm, *mlp]
    backbone = [(1, 1, 384), (1, 197, 384), (384, 3, 16, 16), (384,), *block * 12, *norm]
    head = [(2048, 384), (2048,), (2048, 2048), (2048,), (256, 2048), (256,), (65536, 256)]
    return [*backbone, *head]


def provider(name: str, teacher: nn.Module, student: nn.Module) -> Step:
    targets, sources = list(teacher.parameters()), list(student.parameters())
    if name == "ours":
        return lambda: K.ema_update_(targets, sources, MOMENTUM)
    if name == "lightly":
        update = pytest.importorskip("lightly.models.utils").update_momentum
        return lambda: update(student, teacher, MOMENTUM)
    if name == "timm":
        average = pytest.importorskip("timm.utils").ModelEmaV3(teacher, decay=MOMENTUM)
        average.module = teacher
        return lambda: average.update(student)
    if name == "foreach_lerp":
        if targets[0].dtype == sources[0].dtype:
            return lambda: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)
        return lambda: torch._foreach_lerp_(targets, [s.to(targets[0].dtype) for s in sources], 1 - MOMENTUM)

    def dino() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * source.detach().data)

    def loop() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)

    return {"dino": dino, "loop": loop}[name]


def verify(name: str, start: list[Tensor], student: nn.Module) -> None:
    """Against float64, after two steps."""
    teacher = Parameters(start)
    step = provider(name, teacher, student)
    with torch.no_grad():
        step()
        step()
    for target, old, source in zip(teacher.parameters(), start, student.parameters(), strict=True):
        kept = MOMENTUM**2
        expected = kept * old.double() + (1 - kept) * source.double()
        # Some round (1 - m) times a student below 7.8 to bfloat16, twice, by at most 2^-14.
        tolerance = 1e-6 if source.dtype == torch.float32 else 1.3e-4
        assert (target - expected).abs().max() <= tolerance


SHAPES = {"ViT-S + DINO head": vit_small_with_dino_head(), "5,000 of 64": [(64,)] * 5000}
QUICK = {"3 parameters": [(16, 3), (16,), (7,)]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = QUICK if metafunc.config.getoption("--quick") else SHAPES
    metafunc.parametrize(("model", "shapes"), list(shapes.items()), ids=list(shapes))


@pytest.mark.parametrize("name", ["ours", "dino", "loop", "lightly", "timm", "foreach_lerp"])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_ema(benchmark: Any, name: str, student_dtype: torch.dtype, model: str, shapes: list[tuple[int, ...]]) -> None:
    start = [torch.randn(shape) for shape in shapes]
    student = Parameters([torch.randn(shape).to(student_dtype) for shape in shapes])
    verify(name, start, student)
    teacher = Parameters(start)
    step = provider(name, teacher, student)
    numbers = sum(tensor.numel() for tensor in start)
    benchmark.extra_info.update(
        op="ema", provider=name, mode="update", shape=f"{model}, {str(student_dtype).removeprefix('torch.')} student",
        gbytes=numbers * (8 + student_dtype.itemsize) / 1e9, copy_gbytes_per_s=copy_gbytes_per_s(),
    )  # fmt: skip
    with torch.no_grad():
        benchmark.pedantic(step, rounds=10, warmup_rounds=2)
        benchmark.extra_info["peak_mb"] = peak_mb(step)
