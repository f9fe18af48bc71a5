"""Triton kernels, one module per op under the op's name. Importing one needs Triton, but neither a GPU nor a driver."""
