"""How the CPU benchmarks measure a case: outputs compared first, then timed, and held against the machine's limits."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from machine import limits
from memory import peak_mb
from problem import Case, Loss, NotComparableError, error, step
from torch import Tensor

from ssl_kernels import use_tile_budget

MOST_COMPARED = 8192  # of the rows of a formula that keeps several matrices of them
MOST_ROUNDS, LEAST_ROUNDS, ROUNDS_S = 50, 3, 2.0
LONG_S = 10.0  # a step that takes this long is timed once


def verify(loss: Loss, expected: Loss, leaves: Sequence[Tensor], mode: str, tolerance: float = 1e-4) -> None:
    """The same value and, with backward, the same gradients for every leaf that requires one."""
    assert error(loss, expected, leaves, mode) <= tolerance


@functools.cache  # again when a provider has brought more
def freeze(modules: int) -> None:
    """What the modules hold, half a million objects, is no garbage: collections before a peak need not look at it."""
    gc.collect()
    gc.freeze()


def measure(benchmark: Any, quick: bool, backend: str, case: Case) -> None:
    """Time steps and record them with their peak memory, their floor, and the machine's own rates."""
    freeze(len(sys.modules))
    op, shape, provider, mode = case
    device = torch.device("cpu")
    comparable = op.comparable(shape, MOST_COMPARED)
    problem = op.problem(*comparable, op.dtype, device)
    try:
        loss = problem.loss(provider, backend)
    except (ModuleNotFoundError, NotComparableError) as reason:
        pytest.skip(str(reason))
    if loss is not problem.formula:
        assert problem.error(provider, loss, mode) <= op.tolerances.get(provider, op.tolerance)
    if comparable != shape:
        problem = op.problem(*shape, op.dtype, device)
        loss = problem.loss(provider, backend)
    floor = problem.floor(provider, mode == "forward+backward")
    info = benchmark.extra_info
    info.update(op=op.name, provider=provider, mode=mode, shape=op.describe(*shape) + op.suffix, **limits(floor, quick))

    def once() -> None:
        step(loss, problem.leaves, mode)

    start = time.perf_counter()
    once()
    seconds = time.perf_counter() - start
    least = 1 if quick or seconds > LONG_S else LEAST_ROUNDS
    rounds = least if quick else max(least, min(MOST_ROUNDS, int(ROUNDS_S / seconds)))
    benchmark.pedantic(once, rounds=rounds)
    for leaf in problem.leaves:
        leaf.grad = None
    if floor.gflop:
        info["peak_mb"] = peak_mb(once)
        return
    with use_tile_budget(0):  # what is held for the next step counts for this one
        once()
        for leaf in problem.leaves:
            leaf.grad = None
        info["peak_mb"] = peak_mb(once)
