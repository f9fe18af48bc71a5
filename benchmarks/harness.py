"""What the benchmarks of losses share: one step, the comparison before it is timed, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from machine import copy_gbytes_per_s, exp_gexp_per_s, gemm_gflops
from memory import peak_mb
from torch import Tensor

from ssl_kernels import use_tile_budget

Loss = Callable[..., Tensor]
MODES = ("forward", "forward+backward")


def step(loss: Loss, leaves: Sequence[Tensor], mode: str) -> Tensor:
    if mode == "forward":
        with torch.no_grad():
            return loss(*leaves)
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    value.backward()
    return value.detach()


def verify(loss: Loss, expected: Loss, leaves: Sequence[Tensor], mode: str, tolerance: float = 1e-4) -> None:
    """The same value and, with backward, the same gradients for every leaf that requires one."""

    def results(loss: Loss) -> list[Tensor | None]:
        value = step(loss, leaves, mode)
        return [value, *(leaf.grad for leaf in leaves if leaf.requires_grad and mode != "forward")]

    for a, b in zip(results(loss), results(expected), strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6


def measure(
    benchmark: Any,
    loss: Loss,
    leaves: Sequence[Tensor],
    *,
    op: str,
    provider: str,
    mode: str,
    shape: str,
    width: int,
    gflop: float,
    rounds: int,
) -> None:
    """Time steps and record them with their peak memory and the machine's own rate of products ``width`` deep.

    ``gflop`` is of the matrix products that this provider cannot do without.
    """
    info = benchmark.extra_info
    info.update(op=op, provider=provider, mode=mode, shape=shape, width=width, gflop=gflop, **gemm_gflops(width))
    benchmark.pedantic(step, args=(loss, leaves, mode), rounds=rounds, warmup_rounds=1)
    for leaf in leaves:
        leaf.grad = None
    info["peak_mb"] = peak_mb(lambda: step(loss, leaves, mode))


def measure_sweep(
    benchmark: Any,
    loss: Loss,
    leaves: Sequence[Tensor],
    *,
    op: str,
    provider: str,
    mode: str,
    shape: str,
    gbytes: float,
    gexp: float,
    rounds: int,
) -> None:
    """Time steps that sweep over memory and record them with their peak memory and the machine's own limits.

    ``gbytes`` and ``gexp``, in 10^9, are what nobody can do without to read, to write, and to exponentiate.
    """
    info = benchmark.extra_info
    info.update(op=op, provider=provider, mode=mode, shape=shape, gbytes=gbytes, gexp=gexp)
    info.update(copy_gbytes_per_s=copy_gbytes_per_s(), exp_gexp_per_s=exp_gexp_per_s())
    benchmark.pedantic(step, args=(loss, leaves, mode), rounds=rounds, warmup_rounds=1)
    with use_tile_budget(0):  # what is held for the next step counts for this one
        step(loss, leaves, mode)
        for leaf in leaves:
            leaf.grad = None
        info["peak_mb"] = peak_mb(lambda: step(loss, leaves, mode))
