"""A pytest plugin: tests that ask for the CPU's kernel of an op that CUDA C++ has, too, get that one, emulated.

So the tests of `ema_update_` and `enqueue_` run on it from the public function down, each test in an order of blocks
and threads of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import load_ops

from ssl_kernels import settings
from ssl_kernels.ops import ema, queue

EMULATOR = load_ops()
ORDERS = itertools.count()
PASSED: Counter[str] = Counter()  # by file
LAUNCHES: Counter[str] = Counter()


def choose_backend(device: torch.device, dtype: torch.dtype, kernels: Sequence[str]) -> str:
    chosen = settings.choose_backend(device, dtype, kernels)
    return "cuda" if chosen == "cpu" else chosen


def pytest_configure() -> None:
    ours, emulated = torch.ops.ssl_kernels, torch.ops.ssl_kernels_emulated
    ours.ema_update_cuda_, ours.enqueue_cuda_ = emulated.ema_update_cuda_, emulated.enqueue_cuda_
    ema.choose_backend = queue.choose_backend = choose_backend


def pytest_runtest_setup() -> None:
    EMULATOR.seed(next(ORDERS))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = Path(report.location[0]).name
    LAUNCHES[file] += EMULATOR.launches - LAUNCHES.total()
    PASSED[file] += report.when == "call" and report.passed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for file, passed in PASSED.items():
        terminalreporter.write_line(f"{file}: {passed} passed, {LAUNCHES[file]} launches")
