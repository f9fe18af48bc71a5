"""SigLIP loss: ours, open_clip's, the eager one-liner, and the one-liner compiled; fp32, side by side in one run.

Outputs are compared before anything is timed, but for the large batch's, which nothing else here can hold.
``report.py`` turns the JSON into ratios: time against the other providers, 6 B^2 D FLOP (2 B^2 D forward only) against
the machine's matrix-product rate, and peak memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from machine import gemm_gflops
from memory import peak_mb
from torch import Tensor

from ssl_kernels import SigLipLoss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return -F.logsigmoid((2 * torch.eye(len(x)) - 1) * (scale * x @ y.t() + bias)).sum() / len(x)


@functools.cache
def provider(name: str) -> Loss:
    if name == "open_clip":
        return pytest.importorskip("open_clip").loss.SigLipLoss()
    return {"ours": SigLipLoss(), "eager": eager, "compile": torch.compile(eager)}[name]


PROVIDERS = ("ours", "open_clip", "eager", "compile")
SHAPES = [(batch, width) for batch in (1024, 4096, 8192) for width in (128, 512, 768, 1152)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "width" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        large = metafunc.function.__name__ == "bench_large_batch"
        shapes = [(64, 16)] if quick else [(32_768, 512)] if large else SHAPES
        metafunc.parametrize(("batch", "width"), shapes)


def inputs(batch: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, width, generator=generator), dim=-1) for _ in range(2))
    return [t.requires_grad_() for t in (x, y, torch.tensor(10.0), torch.tensor(-10.0))]


def step(loss: Loss, leaves: list[Tensor], mode: str) -> Tensor:
    if mode == "forward":
        with torch.no_grad():
            return loss(*leaves)
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    value.backward()
    return value.detach()


def verify(leaves: list[Tensor], loss: Loss, mode: str) -> None:
    def results(loss: Loss) -> list[Tensor]:
        value = step(loss, leaves, mode)
        return [value, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    got, expected = results(loss), results(eager)
    assert len(got) == len(expected) == (1 if mode == "forward" else 5)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def measure(benchmark: Any, loss: Loss, batch: int, width: int, mode: str, rounds: int) -> None:
    leaves = inputs(batch, width)
    info = benchmark.extra_info
    info.update(batch=batch, width=width, mode=mode, gflop=(2 if mode == "forward" else 6) * batch**2 * width / 1e9)
    info.update(gemm_gflops(width))
    benchmark.pedantic(step, args=(loss, leaves, mode), rounds=rounds, warmup_rounds=1)
    for leaf in leaves:
        leaf.grad = None
    info["peak_mb"] = peak_mb(lambda: step(loss, leaves, mode))


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", PROVIDERS)
def bench_sigmoid(benchmark: Any, name: str, batch: int, width: int, mode: str) -> None:
    benchmark.extra_info["provider"] = name
    if name != "eager":
        verify(inputs(batch, width), provider(name), mode)
    measure(benchmark, provider(name), batch, width, mode, rounds=8 if batch < 8192 else 3)


def bench_large_batch(benchmark: Any, batch: int, width: int) -> None:
    """A batch whose similarity matrix (4 GB) the others keep several times over."""
    benchmark.extra_info["provider"] = "ours"
    measure(benchmark, provider("ours"), batch, width, "forward+backward", rounds=1)
