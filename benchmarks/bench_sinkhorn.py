"""Sinkhorn-Knopp: our centre, our written assignment, DINOv2's formula, and that compiled; fp32, in one run.

The floor of three iterations over logits that no cache holds is to read them three times and one exponential to an
element each time; the assignment is read and written once more.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import Loss, measure_sweep, verify
from torch import Tensor

import ssl_kernels.functional as K

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


PROVIDERS: dict[str, Loss] = {
    "ours": functools.partial(K.sinkhorn_center, teacher_temp=TEMP, n_iterations=ITERATIONS),
    "ours, written": functools.partial(K.sinkhorn_knopp, teacher_temp=TEMP, n_iterations=ITERATIONS),
    "eager": eager,
    "compile": torch.compile(eager),
}


@functools.cache
def logits(rows: int, width: int) -> Tensor:
    """As of a normalised head: at larger ones the exponentials of the others overflow."""
    return 0.1 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


SHAPES = [(64, 65_536), (1024, 65_536), (128, 4096)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("rows", "width"), [(16, 64)] if quick else SHAPES)


@pytest.mark.parametrize("name", list(PROVIDERS))
def bench_sinkhorn(benchmark: Any, name: str, rows: int, width: int) -> None:
    call, teacher = PROVIDERS[name], logits(rows, width)
    if name == "ours":
        verify(lambda t: torch.softmax((t - call(t)) / TEMP, 1), eager, [teacher], "forward")
    elif name != "eager":
        verify(call, eager, [teacher], "forward")
    passes, exponentials = (5, 4) if name == "ours, written" else (3, 3)
    measure_sweep(
        benchmark, call, [teacher], op="sinkhorn", provider=name, mode="forward", shape=f"N={rows} K={width}",
        gbytes=passes * teacher.nbytes / 1e9, gexp=exponentials * teacher.numel() / 1e9,
        rounds=2 if rows * width > 2**24 else 8,
    )  # fmt: skip
