"""`pytest benchmarks` has the options and the cases of `ssl-kernels bench`.

The hooks are imported: `pytest_plugins` is for the folder that pytest was started in.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_kernels.bench.plugin import (
    measure,
    pytest_addoption,
    pytest_benchmark_update_machine_info,
    pytest_configure,
    pytest_generate_tests,
)

__all__ = [
    "measure",
    "pytest_addoption",
    "pytest_benchmark_update_machine_info",
    "pytest_configure",
    "pytest_generate_tests",
]

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """`pytest .` tests; what is measured is asked for by name."""
    paths = [(config.invocation_params.dir / word.partition("::")[0]).resolve() for word in config.args]
    return None if any(HERE in (path, *path.parents) for path in paths) else True
