"""What the benchmarks of losses share: one step, the comparison before it is timed, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from machine import gemm_gflops
from memory import peak_mb
from torch import Tensor

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


def verify(loss: Loss, expected: Loss, leaves: Sequence[Tensor], mode: str) -> None:
    """The same value and, with backward, the same gradients for every leaf that requires one."""

    def results(loss: Loss) -> list[Tensor | None]:
        value = step(loss, leaves, mode)
        return [value, *(leaf.grad for leaf in leaves if leaf.requires_grad and mode != "forward")]

    for a, b in zip(results(loss), results(expected), strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


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
