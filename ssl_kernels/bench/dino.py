"""DINO: beside lightly, the authors' loop over pairs, and a single sum over crops in PyTorch.

The floor is one exponential to an element of student and teacher, to read both once, and to write the gradient. What
others spend beyond it are passes over memory: a log-softmax to every crop or to every pair, and its gradient.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.bench.problem import Floor, Loss, NotComparableError, Op, Problem, normal

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """Every crop of the student once, against the sum of its teachers."""
    p = torch.softmax(teacher.float() / TEACHER_TEMP, -1)
    log_s = torch.log_softmax(student.float() / STUDENT_TEMP, -1)
    total, views = p.sum(0), len(teacher)
    own = (p * log_s[:views]).sum()
    pairs = len(teacher) * len(student) - views
    return (own - (total * log_s).sum()) / (pairs * student.shape[1])


def pair_loop(student: Tensor, teacher: Tensor) -> Tensor:
    """The forward pass of DINO's own code."""
    targets = torch.softmax(teacher.float() / TEACHER_TEMP, -1).detach()
    total, terms = torch.zeros((), device=student.device), 0
    for t, q in enumerate(targets):
        for v, crop in enumerate(student / STUDENT_TEMP):
            if v != t:
                total = total + torch.sum(-q * torch.log_softmax(crop.float(), -1), -1).mean()
                terms += 1
    return total / terms


def lightly(width: int, dtype: torch.dtype, device: torch.device) -> Loss:
    if dtype != torch.float32:
        raise NotComparableError("multiplies 16-bit and float32 tensors, which raises")
    loss = pkgutil.resolve_name("lightly.loss:DINOLoss")(width, center_momentum=1.0).to(device)
    return lambda student, teacher: loss(list(teacher), list(student))


def problem(batch: int, crops: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Logits as of a normalised head: of the student, and without gradient of the teacher."""
    student, teacher = normal(crops + 2, batch, width, dtype=dtype, device=device, scale=0.1).split([crops, 2])
    ours = functools.partial(K.dino_loss, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP)

    def floor(provider: str, backward: bool) -> Floor:
        logits, gradient = student.numel() + teacher.numel(), student.numel() if backward else 0
        return Floor(gbytes=(logits + gradient) * dtype.itemsize / 1e9, gexp=logits / 1e9)

    providers: dict[str, Callable[[], Loss]] = {
        "ours": lambda: ours,
        "lightly": lambda: lightly(width, dtype, device),
        "pair loop": lambda: pair_loop,
    }
    return Problem([student.requires_grad_(), teacher], eager, providers, floor)


DINO = Op(
    "dino",
    "DINO",
    problem,
    ("ours", "lightly", "pair loop", "eager", "compile"),
    [(32, 10, 65_536), (64, 8, 4096)],
    tiny=[(4, 6, 64)],
    gpu_shapes=[(64, 10, 65_536), (64, 10, 131_072)],
    describe="B={} crops={} K={}".format,
    label="fp32",
    tolerances={"lightly": 1e-3},  # it adds B K products up in one fp32 chain: off by 0.07% at 2 million of them
)
DINO_16_BITS = replace(
    DINO,
    providers=("ours", "pair loop", "eager"),
    shapes=DINO.shapes[:1],
    suffix=" bf16",
    label="bf16",
    dtype=torch.bfloat16,
    tolerance=2**-7,
)
