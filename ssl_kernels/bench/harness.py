"""How a case is measured on the CPU: outputs compared first, then timed beside ours, and held against the machine."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssl_kernels.bench.machine import limits
from ssl_kernels.bench.memory import is_readable, peak_mb, settle_allocator
from ssl_kernels.bench.problem import Case, Floor, Loss, NotComparableError, Problem, is_ours, is_peer, step
from ssl_kernels.ops import reuse

MOST_COMPARED = {"full": 4096, "quick": 1024, "tiny": 1024}  # rows of a formula that keeps several matrices of them
ROUNDS_S = {"full": 0.5, "quick": 0.2, "tiny": 0.0}
MOST_ROUNDS = 200
LEAST_ROUNDS = {0.0: 3, 3.0: 2, 10.0: 1}  # of steps that take so many seconds or more
LONG_GFLOP = 1000.0  # of a step that is taken once for its memory and once for its time
CPU = torch.device("cpu")

errors: dict[tuple[Any, ...], float] = {}  # of what was compared; along a sweep, that is the same again


@functools.cache  # again when a provider has brought more
def freeze(modules: int) -> None:
    """What the modules hold, half a million objects, is no garbage: collections before a peak need not look at it."""
    gc.collect()
    gc.freeze()


def measure(benchmark: Any, size: str, backend: str, case: Case) -> None:
    """Time steps and record them with their peak memory, their floor, and the machine's own rates.

    Before each step of another provider ours takes one, whose time is recorded as well: what slows the machine down
    for a while slows down both.
    """
    freeze(len(sys.modules))
    settle_allocator()
    threads = torch.get_num_threads()
    torch.set_num_threads(case.op.threads or threads)
    try:
        _measure(benchmark, size, case, *_prepare(case, MOST_COMPARED[size], backend))
    except NotComparableError as reason:
        pytest.skip(str(reason))
    finally:
        torch.set_num_threads(threads)


def _loss(problem: Problem, provider: str, backend: str) -> Loss:
    try:
        return problem.loss(provider, backend)
    except ModuleNotFoundError as error:
        if not is_peer(provider):
            raise
        pytest.skip(f"{(error.name or provider).partition('.')[0]} is not installed")


def _prepare(case: Case, most_compared: int, backend: str) -> tuple[Problem, Loss, Loss]:
    """The problem, the provider's loss once it is compared, and ours."""
    op, shape, provider, mode = case
    comparable = op.comparable(shape, most_compared)
    key = (op.name, op.suffix, provider, mode, *comparable)
    if key not in errors:
        problem = op.problem(*comparable, op.dtype, CPU)
        loss = _loss(problem, provider, backend)
        errors[key] = 0.0 if loss is problem.formula else problem.error(provider, loss, mode)
    allowed = op.tolerances.get(provider, op.tolerance)
    assert errors[key] <= allowed, f"{provider}: relative error {errors[key]:.2g}, allowed {allowed:.2g}"
    problem = op.problem(*shape, op.dtype, CPU)
    return problem, _loss(problem, provider, backend), problem.loss("ours")


def _measure(benchmark: Any, size: str, case: Case, problem: Problem, loss: Loss, ours: Loss) -> None:
    op, shape, provider, mode = case
    floor = problem.floor(provider, mode == "forward+backward")
    info = benchmark.extra_info
    info |= {"op": op.name, "shape": op.describe(*shape) + op.suffix, "provider": provider, "mode": mode}
    if shape in op.sweep and mode == op.modes[-1]:
        info |= {"batch": shape[0], "only_swept": shape not in op.shapes}
    if is_ours(provider):
        info |= limits(floor, size == "tiny")

    def once() -> None:
        step(loss, problem.leaves, mode)

    ours_seconds: list[float] = []

    def ours_once() -> None:
        ours_seconds.append(_seconds(lambda: step(ours, problem.leaves, mode)))

    beside = {} if provider == "ours" else {"setup": ours_once}

    def timed(rounds: int) -> None:
        benchmark.pedantic(once, rounds=rounds, **beside)

    def peak() -> float | None:
        """Of an ordinary step, whose tiles and outputs count although ours holds them for the next one."""
        if floor == Floor():  # small batches are not asked
            return None
        for leaf in problem.leaves:
            leaf.grad = None
        if is_ours(provider):
            reuse.let_go()
        return _peak_mb(once)

    if floor.gflop >= LONG_GFLOP:
        info["peak_mb"] = peak()
        timed(1)
    else:
        timed(_rounds(once, size, compiles=provider == "compile"))
        info["peak_mb"] = peak()
    if ours_seconds:
        info["ours_seconds"] = min(ours_seconds)


def _rounds(once: Callable[[], None], size: str, compiles: bool) -> int:
    """So many steps as fit the time that a case may take, by a first one."""
    seconds = _seconds(once)
    if compiles and size != "tiny":
        seconds = _seconds(once)  # the first has compiled, where what was compared is smaller
    least = min(rounds for at_least_s, rounds in LEAST_ROUNDS.items() if seconds >= at_least_s)
    least = {"full": least, "quick": min(least, 2), "tiny": 1}[size]
    return max(least, min(MOST_ROUNDS, int(ROUNDS_S[size] / seconds)))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _peak_mb(call: Callable[[], Any]) -> float | None:
    if is_readable():
        return peak_mb(call)
    call()
    return None
