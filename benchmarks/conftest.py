"""Options of the benchmarks, and what the results say of the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ssl_kernels import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: shows that the benchmarks run, not how fast")
    parser.addoption("--threads", type=int, default=2, help="threads of every provider")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = _C.active_isa()
    machine_info["load_before"] = os.getloadavg()[0]
