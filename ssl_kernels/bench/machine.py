"""The machine's own limits, which every benchmark is held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from ssl_kernels.bench.problem import Floor
from ssl_kernels.ops.matmul import matmul


def best_seconds(call: Callable[[], Any], rounds: int = 8) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _operands(side: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(side, width), torch.randn(side, width), torch.empty(side, side)


def limits(floor: Floor, quick: bool) -> dict[str, float]:
    """A floor, and the rates that the machine reaches at each of its parts."""
    found: dict[str, float] = {}
    if floor.gflop:
        found |= {"gflop": floor.gflop, "width": floor.width} | gemm_gflops(floor.width, 64 if quick else 2048)
    if floor.gbytes:
        found |= {"gbytes": floor.gbytes, "copy_gbytes_per_s": copy_gbytes_per_s(1 if quick else 256)}
    if floor.gexp:
        found |= {"gexp": floor.gexp, "exp_gexp_per_s": exp_gexp_per_s()}
    return found


def gemm_gflops(width: int, side: int) -> dict[str, float]:
    """fp32 GFLOP/s of [side, width] x [width, side]: through torch.mm, and by the fastest product in this torch."""
    a, b, out = _operands(side, width)
    gflop = 2 * side * side * width / 1e9
    mm = gflop / best_seconds(lambda: torch.mm(a, b.t(), out=out))
    fastest = gflop / best_seconds(lambda: matmul(a, b.t()))
    return {"torch_mm_gflops": mm, "fastest_gemm_gflops": max(mm, fastest)}


@functools.cache
def copy_gbytes_per_s(megabytes: int) -> float:
    """Bytes read plus written per second by copying memory that no cache holds."""
    source, target = torch.zeros(megabytes, 2**18), torch.zeros(megabytes, 2**18)
    return 2 * megabytes * 2**20 / 1e9 / best_seconds(lambda: target.copy_(source))


@functools.cache
def exp_gexp_per_s() -> float:
    """Vectorised fp32 exponentials per second, in 10^9, by torch.exp within the second-level caches."""
    x = torch.randn(2**17)
    out = torch.empty_like(x)
    times = 64
    return times * x.numel() / 1e9 / best_seconds(lambda: [torch.exp(x, out=out) for _ in range(times)])
