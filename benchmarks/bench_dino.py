"""DINO: ours, lightly, the authors' loop over pairs, a single sum over crops in PyTorch, and that compiled; in one run.

The floor is one exponential to an element of student and teacher, to read both once, and to write the gradient. What
others spend beyond it are passes over memory: a log-softmax to every crop or to every pair, and its gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import MODES, Loss, measure_sweep, verify
from torch import Tensor

import ssl_kernels.functional as K

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
    total, terms = torch.zeros(()), 0
    for t, q in enumerate(targets):
        for v, crop in enumerate(student / STUDENT_TEMP):
            if v != t:
                total = total + torch.sum(-q * torch.log_softmax(crop.float(), -1), -1).mean()
                terms += 1
    return total / terms


compiled = torch.compile(eager)


@functools.cache
def criterion_of_lightly(width: int) -> Any:
    return pytest.importorskip("lightly.loss").DINOLoss(width, center_momentum=1.0)


def provider(name: str, width: int) -> Loss:
    if name == "lightly":
        criterion = criterion_of_lightly(width)
        return lambda student, teacher: criterion(list(teacher), list(student))
    ours = functools.partial(K.dino_loss, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP)
    return {"ours": ours, "pair loop": pair_loop, "eager": eager, "compile": compiled}[name]


@functools.cache
def inputs(batch: int, crops: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Logits as of a normalised head: of the student, and without gradient of the teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (0.1 * torch.randn(n, batch, width, generator=generator) for n in (crops, 2))
    return [student.to(dtype).requires_grad_(), teacher.to(dtype)]


SHAPES = [
    (32, 10, 65_536, torch.float32),
    (32, 10, 65_536, torch.bfloat16),
    (64, 8, 4096, torch.float32),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    shapes = [(4, 6, 64, torch.float32), (4, 6, 64, torch.bfloat16)] if quick else SHAPES
    metafunc.parametrize(("batch", "crops", "width", "dtype"), shapes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "lightly", "pair loop", "eager", "compile"])
def bench_dino(benchmark: Any, name: str, batch: int, crops: int, width: int, dtype: torch.dtype, mode: str) -> None:
    if dtype == torch.bfloat16 and name in ("lightly", "compile"):
        pytest.skip("lightly's product of fp32 and 16-bit tensors raises; fp32 shows what compiling does")
    loss, leaves = provider(name, width), inputs(batch, crops, width, dtype)
    if name != "eager":
        # lightly adds B K products up in one fp32 chain, which is off by 0.07% at 2 million of them.
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-3 if name == "lightly" else 1e-4
        verify(loss, provider("eager", width), leaves, mode, tolerance)
    logits = (crops + 2) * batch * width
    moved = logits + (crops * batch * width if mode != "forward" else 0)
    kind = " bf16" if dtype == torch.bfloat16 else ""
    measure_sweep(
        benchmark, loss, leaves, op="dino", provider=name, mode=mode, shape=f"B={batch} crops={crops} K={width}{kind}",
        gbytes=moved * leaves[0].element_size() / 1e9, gexp=logits / 1e9, rounds=3 if width > 10_000 else 8,
    )  # fmt: skip
