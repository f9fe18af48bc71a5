"""Benchmarks beside the peers' own code: `ssl-kernels bench`. They need the `bench` extra."""
