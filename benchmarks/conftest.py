"""Options of the benchmarks, their cases, and what the results say of the machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from problem import Case

from ssl_kernels import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: shows that the benchmarks run, not how fast")
    parser.addoption("--compile-backend", default="inductor", help="torch.compile's")
    parser.addoption("--threads", type=int, default=2, help="threads of every provider")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    cases = [
        Case(op, shape, provider, mode)
        for op in getattr(metafunc.function, "ops", ())
        for shape in (op.quick if quick else op.shapes)
        for provider in op.providers
        for mode in op.modes
    ]
    if cases:
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    quick, backend = (request.config.getoption(name) for name in ("--quick", "--compile-backend"))
    return functools.partial(harness.measure, benchmark, quick, backend)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = _C.active_isa()
    machine_info["load_before"] = os.getloadavg()[0]
