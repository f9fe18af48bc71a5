"""The suite of `ssl-kernels bench`, for `pytest benchmarks -k sigmoid --benchmark-autosave` and `--benchmark-compare`."""

from ssl_kernels.bench.suite import bench_op

__all__ = ["bench_op"]
