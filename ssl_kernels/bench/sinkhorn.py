"""Sinkhorn-Knopp: our centre and our written assignment, beside DINOv2's formula.

The floor of three iterations over logits that no cache holds is to read them three times and one exponential to an
element each time; the assignment is read and written once more.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.bench.problem import Floor, Op, Problem, normal

TEMP, ITERATIONS = 0.07, 3


def eager(teacher: Tensor) -> Tensor:
    """The assignment by DINOv2's own steps, in one process."""
    q = torch.exp(teacher / TEMP).t()
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    q *= samples
    return q.t()


def problem(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    # As of a normalised head: at larger logits the exponentials of the others overflow.
    teacher = normal(rows, width, dtype=dtype, device=device, scale=0.1)

    def floor(provider: str, backward: bool) -> Floor:
        passes, exponentials = (5, 4) if provider == "ours, written" else (3, 3)
        return Floor(gbytes=passes * teacher.nbytes / 1e9, gexp=exponentials * teacher.numel() / 1e9)

    providers = {
        "ours": lambda: functools.partial(K.sinkhorn_center, teacher_temp=TEMP, n_iterations=ITERATIONS),
        "ours, written": lambda: functools.partial(K.sinkhorn_knopp, teacher_temp=TEMP, n_iterations=ITERATIONS),
    }
    compared = {"ours": lambda center: torch.softmax((teacher - center) / TEMP, 1)}
    return Problem([teacher], eager, providers, floor, compared)


SINKHORN = Op(
    "sinkhorn",
    "Sinkhorn-Knopp",
    problem,
    ("ours", "ours, written", "eager", "compile"),
    [(1024, 65_536), (64, 65_536), (128, 4096)],
    tiny=[(16, 64)],
    describe="N={} K={}".format,
    modes=("forward",),
)
