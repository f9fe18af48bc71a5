"""VICReg and Barlow Twins: ours, lightly's, the eager formula, and it compiled; fp32, in one run.

A unit is 2 n D^2 FLOP, or 2 n^2 D where the squares are taken through the rows (2 n <= D). VICReg takes one for each
view and one more for each gradient; Barlow Twins one and two more, or two and two more through the rows.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Loss, measure, verify
from torch import Tensor

from ssl_kernels import BarlowTwinsLoss, VICRegLoss


def eager_vicreg(za: Tensor, zb: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(za, zb)
    for z in (za, zb):
        c = z - z.mean(0)
        covariance = c.t() @ c / (len(z) - 1)
        variance = covariance.diagonal()
        squares = (covariance.square().sum() - variance.square().sum()) / z.shape[1]
        loss = loss + 12.5 * F.relu(1 - torch.sqrt(variance + 1e-4)).mean() + squares
    return loss


def eager_barlow_twins(za: Tensor, zb: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (za, zb))
    correlation = a.t() @ b / len(a)
    diagonal = correlation.diagonal()
    return (diagonal - 1).square().sum() + 5e-3 * (correlation.square().sum() - diagonal.square().sum())


EAGER = {"vicreg": eager_vicreg, "barlow_twins": eager_barlow_twins}


@functools.cache
def provider(loss: str, name: str) -> Loss:
    if name == "lightly":
        lightly = pytest.importorskip("lightly.loss")
        return {"vicreg": lightly.VICRegLoss, "barlow_twins": lightly.BarlowTwinsLoss}[loss]()
    if name == "ours":
        return {"vicreg": VICRegLoss, "barlow_twins": BarlowTwinsLoss}[loss]()
    return EAGER[loss] if name == "eager" else torch.compile(EAGER[loss])


SHAPES = [(256, 2048), (2048, 2048), (256, 8192)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("batch", "width"), [(16, 64)] if quick else SHAPES)


def inputs(batch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, width, generator=generator).requires_grad_() for _ in range(2)]


def units(loss: str, mode: str, by_rows: bool) -> int:
    forward = 2 if loss == "vicreg" or by_rows else 1
    return forward if mode == "forward" else forward + 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "lightly", "eager", "compile"])
@pytest.mark.parametrize("loss", EAGER)
def bench_vicreg(benchmark: Any, loss: str, name: str, batch: int, width: int, mode: str) -> None:
    if name != "eager":
        verify(provider(loss, name), EAGER[loss], inputs(batch, width), mode)
    by_rows = 2 * batch <= width
    gflop = units(loss, mode, by_rows) * 2 * batch * width * (batch if by_rows else width) / 1e9
    measure(
        benchmark, provider(loss, name), inputs(batch, width), op=loss, provider=name, mode=mode,
        shape=f"n={batch} D={width}", width=min(batch, width), gflop=gflop, rounds=6 if width < 8192 else 2,
    )  # fmt: skip
