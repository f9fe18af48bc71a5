"""`pytest benchmarks` has the options and the cases of `ssl-kernels bench`.

The hooks are imported: `pytest_plugins` is for the folder that pytest was started in.
"""

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
