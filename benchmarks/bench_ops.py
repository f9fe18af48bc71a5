"""The suite of `ssl-kernels bench`, for `pytest benchmarks` with pytest-benchmark's own options."""

from ssl_kernels.bench.suite import bench_op

__all__ = ["bench_op"]
