"""Triton kernels, one module per op under the op's name. Importing one needs Triton, but neither a GPU nor a driver.

The ops import them where they call them: Triton is not everywhere.
"""

try:
    import triton  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "backend 'triton': Triton is not installed; install it or use_backend('eager')", name="triton"
    ) from error
