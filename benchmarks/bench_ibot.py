"""iBOT: ours, DINOv2's formulas, those compiled, and lightly; fp32, in one run.

Once with Sinkhorn-Knopp, whose assignment ours does not write, and once with a centre, which is all that lightly has.
The floor is one exponential to an element of student and teacher, to read both, and to write the gradient; three more
of the teacher, and three more reads, for Sinkhorn-Knopp.
"""

from __future__ import annotations

import functools
from typing import Any

import bench_sinkhorn
import pytest
import torch
from harness import MODES, Loss, measure_sweep, verify
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import IBOTPatchLoss

STUDENT_TEMP, TEACHER_TEMP = 0.1, bench_sinkhorn.TEMP
IMAGES = 16


@functools.cache
def mask_and_weights(patches: int) -> tuple[Tensor, Tensor]:
    """As many masked patches in each of the images."""
    each = patches // IMAGES
    mask = (torch.arange(2 * each) < each).expand(IMAGES, -1)[:, None]
    return mask, torch.full((patches,), 1 / patches)


def cross_entropy(student: Tensor, p: Tensor, weights: Tensor) -> Tensor:
    return -(torch.sum(p * torch.log_softmax(student / STUDENT_TEMP, -1), -1) * weights).sum()


def eager_with_sinkhorn(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    return cross_entropy(student, bench_sinkhorn.eager(teacher), weights)


def eager_with_center(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    return cross_entropy(student, torch.softmax(teacher / TEACHER_TEMP, -1), weights)


def ours_with_sinkhorn(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    center = K.sinkhorn_center(teacher, TEACHER_TEMP, n_iterations=bench_sinkhorn.ITERATIONS)
    temps = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
    loss = K.ibot_patch_loss(student, teacher, weights, center=center, **temps)
    assert isinstance(loss, Tensor)
    return loss


@functools.cache
def criterion(name: str, width: int) -> Any:
    kind = IBOTPatchLoss if name == "ours" else pytest.importorskip("lightly.loss").IBOTPatchLoss
    return kind(width, TEACHER_TEMP, STUDENT_TEMP, center_momentum=1.0)


compiled = torch.compile(eager_with_sinkhorn)


def provider(name: str, target: str, patches: int, width: int) -> Loss:
    mask, weights = mask_and_weights(patches)
    if target == "sinkhorn":
        loss = {"ours": ours_with_sinkhorn, "eager": eager_with_sinkhorn, "compile": compiled}[name]
    elif name in ("ours", "lightly"):
        module = criterion(name, width)
        return lambda student, teacher: module(teacher, student, mask)
    else:
        loss = eager_with_center
    return lambda student, teacher: loss(student, teacher, weights)


@functools.cache
def inputs(patches: int, width: int) -> list[Tensor]:
    student = bench_sinkhorn.logits(patches, width).flip(0).contiguous()
    return [student.requires_grad_(), bench_sinkhorn.logits(patches, width)]


CASES = [("sinkhorn", name) for name in ("ours", "eager", "compile")]
CASES += [("center", name) for name in ("ours", "lightly", "eager")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("patches", "width"), [(32, 64)] if quick else [(1024, 65_536)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("target", "name"), CASES)
def bench_ibot(benchmark: Any, target: str, name: str, patches: int, width: int, mode: str) -> None:
    loss, leaves = provider(name, target, patches, width), inputs(patches, width)
    if name != "eager":
        verify(loss, provider("eager", target, patches, width), leaves, mode)
    reads = 2 + (bench_sinkhorn.ITERATIONS if target == "sinkhorn" else 0)
    size = patches * width
    measure_sweep(
        benchmark, loss, leaves, op="ibot", provider=name, mode=mode, shape=f"N={patches} K={width} {target}",
        gbytes=(reads + (mode != "forward")) * size * 4 / 1e9, gexp=reads * size / 1e9, rounds=2,
    )  # fmt: skip
