"""KoLeo: ours, lightly's, the eager formula, and it compiled; fp32, in one run.

Similarities are symmetric, so that half a unit (2 B^2 D FLOP) is all that has to be multiplied, with or without
gradients; the others multiply a whole one.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Loss, measure, verify
from torch import Tensor

from ssl_kernels import KoLeoLoss

EPS = 1e-8


def eager(x: Tensor) -> Tensor:
    u = F.normalize(x, dim=1, eps=EPS)
    with torch.no_grad():
        neighbor = (u @ u.t()).fill_diagonal_(-2).argmax(1)
    return -torch.log(F.pairwise_distance(u, u[neighbor], 2, EPS) + EPS).mean()


@functools.cache
def provider(name: str) -> Loss:
    if name == "lightly":
        return pytest.importorskip("lightly.loss").KoLeoLoss()
    return {"ours": KoLeoLoss(), "eager": eager, "compile": torch.compile(eager)}[name]


SHAPES = [(512, 384), (8192, 384), (8192, 1024)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("batch", "width"), [(48, 16)] if quick else SHAPES)


def inputs(batch: int, width: int) -> list[Tensor]:
    return [torch.randn(batch, width, generator=torch.Generator().manual_seed(0)).requires_grad_()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "lightly", "eager", "compile"])
def bench_koleo(benchmark: Any, name: str, batch: int, width: int, mode: str) -> None:
    if name != "eager":
        verify(provider(name), eager, inputs(batch, width), mode)
    measure(
        benchmark, provider(name), inputs(batch, width), op="koleo", provider=name, mode=mode,
        shape=f"B={batch} D={width}", width=width, gflop=batch * batch * width / 1e9, rounds=6 if batch < 8192 else 3,
    )  # fmt: skip
