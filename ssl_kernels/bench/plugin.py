"""What pytest needs to run the suite: its options, its cases, its fixture, and what the results say of the machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssl_kernels import _C
from ssl_kernels.bench import harness, suite
from ssl_kernels.bench.problem import Case

LOAD_BEFORE = pytest.StashKey[float]()  # what is saved is asked for after the measurements, which are a load, too


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest benchmarks`; `ssl-kernels bench` sets them, too."""
    parser.addoption("--ops", default=",".join(suite.NAMES), help="names of ops, with commas between them")
    parser.addoption("--size", default="full", choices=suite.SIZES, help="tiny shows that it runs, not how fast")
    parser.addoption("--compile-backend", default="inductor", help="torch.compile's")
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads of every provider")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads", torch.get_num_threads()))
    config.stash[LOAD_BEFORE] = os.getloadavg()[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is suite.bench_op:
        names, size = (metafunc.config.getoption(name) for name in ("--ops", "--size"))
        cases = suite.cases(names.split(","), size)
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case], None]:
    size, backend = (request.config.getoption(name) for name in ("--size", "--compile-backend"))
    return functools.partial(harness.measure, benchmark, size, backend)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = _C.active_isa()
    machine_info["load_before"] = config.stash[LOAD_BEFORE]
