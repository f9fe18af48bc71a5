"""`pytest benchmarks` has the options and the cases of `ssl-kernels bench`."""

pytest_plugins = ["ssl_kernels.bench.plugin"]
