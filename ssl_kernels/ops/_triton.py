"""The Triton kernels of an op, imported when they are first used: Triton is not everywhere."""

from __future__ import annotations

import importlib
from typing import Any


def triton_kernels(op: str) -> Any:
    """The module of ``ssl_kernels.kernels`` that is named like the op."""
    try:
        return importlib.import_module(f"ssl_kernels.kernels.{op}")
    except ImportError as error:
        raise ImportError("backend 'triton': Triton is not installed; install it or use_backend('eager')") from error
