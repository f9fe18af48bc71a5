"""iBOT, beside DINOv2's formulas and lightly.

Once with Sinkhorn-Knopp, whose assignment ours does not write, and once with a centre, which is all that lightly has.
The floor is one exponential to an element of student and teacher, to read both, and to write the gradient; three more
of the teacher, and three more reads, for Sinkhorn-Knopp.
"""

from __future__ import annotations

import functools
import pkgutil
from dataclasses import replace

import torch
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import IBOTPatchLoss
from ssl_kernels.bench.problem import Floor, Loss, Op, Problem, normal
from ssl_kernels.bench.sinkhorn import ITERATIONS
from ssl_kernels.bench.sinkhorn import TEMP as TEACHER_TEMP
from ssl_kernels.bench.sinkhorn import eager as eager_sinkhorn

STUDENT_TEMP, IMAGES = 0.1, 16


def cross_entropy(student: Tensor, p: Tensor) -> Tensor:
    return -torch.sum(p * torch.log_softmax(student / STUDENT_TEMP, -1), -1).mean()


def eager_with_sinkhorn(student: Tensor, teacher: Tensor) -> Tensor:
    return cross_entropy(student, eager_sinkhorn(teacher))


def eager_with_center(student: Tensor, teacher: Tensor) -> Tensor:
    return cross_entropy(student, torch.softmax(teacher / TEACHER_TEMP, -1))


def problem(sinkhorn: bool, patches: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    student, teacher = (normal(patches, width, dtype=dtype, device=device, seed=k, scale=0.1) for k in range(2))
    each = patches // IMAGES  # masked patches of an image
    mask = (torch.arange(2 * each, device=device) < each).expand(IMAGES, -1)[:, None]
    weights = torch.full((patches,), 1 / patches, device=device)

    def ours_with_sinkhorn(student: Tensor, teacher: Tensor) -> Tensor:
        center = K.sinkhorn_center(teacher, TEACHER_TEMP, n_iterations=ITERATIONS)
        return K.ibot_patch_loss(
            student, teacher, weights, center=center, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP
        )

    def with_center(module: type) -> Loss:
        loss = module(width, TEACHER_TEMP, STUDENT_TEMP, center_momentum=1.0).to(device)
        return lambda student, teacher: loss(teacher, student, mask)

    def floor(provider: str, backward: bool) -> Floor:
        reads = 2 + (ITERATIONS if sinkhorn else 0)
        return Floor(gbytes=(reads + backward) * student.nbytes / 1e9, gexp=reads * student.numel() / 1e9)

    providers = {
        "ours": lambda: ours_with_sinkhorn if sinkhorn else with_center(IBOTPatchLoss),
        "lightly": lambda: with_center(pkgutil.resolve_name("lightly.loss:IBOTPatchLoss")),
    }
    formula = eager_with_sinkhorn if sinkhorn else eager_with_center
    return Problem([student.requires_grad_(), teacher], formula, providers, floor)


WITH_SINKHORN = Op(
    "ibot",
    "iBOT",
    functools.partial(problem, True),
    ("ours", "eager", "compile"),
    [(1024, 65_536)],
    tiny=[(32, 64)],
    describe="N={} K={}".format,
    suffix=" sinkhorn",
    label="sinkhorn",
)
WITH_CENTER = replace(
    WITH_SINKHORN,
    problem=functools.partial(problem, False),
    providers=("ours", "lightly", "eager"),
    suffix=" center",
    label="center",
)
