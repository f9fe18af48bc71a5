"""NT-Xent loss: ours, lightly's, pytorch-metric-learning's, the eager formula, and it compiled; fp32, in one run.

A unit is 2 (2N)^2 D FLOP. Similarities are symmetric, so that the loss alone takes half a unit, and gradients one and a
half more, less half a unit for tiles that are kept within the budget.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Loss, measure, verify
from torch import Tensor

from ssl_kernels import NTXentLoss, use_tile_budget
from ssl_kernels.settings import tile_budget_bytes

TEMPERATURE = 0.1


def eager(z0: Tensor, z1: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.t() / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)))


def recompute(z0: Tensor, z1: Tensor) -> Tensor:
    with use_tile_budget(0):
        return NTXentLoss(TEMPERATURE)(z0, z1)


@functools.cache
def provider(name: str) -> Loss:
    if name == "lightly":
        return pytest.importorskip("lightly.loss").NTXentLoss(TEMPERATURE)
    if name == "pytorch-metric-learning":
        loss = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(TEMPERATURE)
        return lambda z0, z1: loss(torch.cat([z0, z1]), torch.arange(len(z0)).repeat(2))
    ours = {"ours": NTXentLoss(TEMPERATURE), "ours, recomputing": recompute}
    return {**ours, "eager": eager, "compile": torch.compile(eager)}[name]


SHAPES = [(128, 128), (512, 128), (2048, 128), (2048, 512), (4096, 128)]
PEER_LIMIT = 128  # pytorch-metric-learning compares every positive with every negative pair: 68 GB at a batch of 2,048


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("batch", "width"), [(32, 16)] if quick else SHAPES)


def inputs(batch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, width, generator=generator).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["ours", "ours, recomputing", "lightly", "pytorch-metric-learning", "eager", "compile"]
)
def bench_nt_xent(benchmark: Any, name: str, batch: int, width: int, mode: str) -> None:
    if name == "pytorch-metric-learning" and batch > PEER_LIMIT:
        pytest.skip("needs more memory than there is")
    if name != "eager":
        verify(provider(name), eager, inputs(batch, width), mode)
    kept = 0.0 if name == "ours, recomputing" else min(1.0, tile_budget_bytes() / (2 * (2 * batch) ** 2))
    units = 0.5 if mode == "forward" else 2 - kept / 2
    measure(
        benchmark, provider(name), inputs(batch, width), op="nt_xent", provider=name, mode=mode,
        shape=f"2N={2 * batch} D={width}", width=width, gflop=units * 2 * (2 * batch) ** 2 * width / 1e9,
        rounds=6 if batch < 4096 else 3,
    )  # fmt: skip
