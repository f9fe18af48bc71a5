"""SigLIP loss: ours, open_clip's, the eager one-liner, and the one-liner compiled; fp32, side by side in one run.

Three products of 2 B^2 D FLOP for loss and gradients, one for the loss alone.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Loss, measure, verify
from torch import Tensor

from ssl_kernels import SigLipLoss


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return -F.logsigmoid((2 * torch.eye(len(x)) - 1) * (scale * x @ y.t() + bias)).sum() / len(x)


@functools.cache
def provider(name: str) -> Loss:
    if name == "open_clip":
        return pytest.importorskip("open_clip").loss.SigLipLoss()
    return {"ours": SigLipLoss(), "eager": eager, "compile": torch.compile(eager)}[name]


SHAPES = [(1024, 512), (4096, 128), (4096, 512), (4096, 768), (4096, 1152), (8192, 128), (8192, 512), (8192, 1152)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    large = metafunc.function.__name__ == "bench_large_batch"
    metafunc.parametrize(("batch", "width"), [(64, 16)] if quick else [(32_768, 512)] if large else SHAPES)


def inputs(batch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2))
    return [t.requires_grad_() for t in (x, y, torch.tensor(10.0), torch.tensor(-10.0))]


def run(benchmark: Any, name: str, batch: int, width: int, mode: str, rounds: int) -> None:
    gflop = (1 if mode == "forward" else 3) * 2 * batch**2 * width / 1e9
    shape = f"B={batch} D={width}"
    measure(
        benchmark, provider(name), inputs(batch, width), op="sigmoid", provider=name, mode=mode, shape=shape,
        width=width, gflop=gflop, rounds=rounds,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "open_clip", "eager", "compile"])
def bench_sigmoid(benchmark: Any, name: str, batch: int, width: int, mode: str) -> None:
    if name != "eager":
        verify(provider(name), eager, inputs(batch, width), mode)
    run(benchmark, name, batch, width, mode, rounds=8 if batch < 8192 else 3)


def bench_large_batch(benchmark: Any, batch: int, width: int) -> None:
    """A batch whose similarity matrix (4 GB) the others keep several times over, and nothing here can compare."""
    run(benchmark, "ours", batch, width, "forward+backward", rounds=1)
