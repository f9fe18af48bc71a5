"""Process-wide settings: which backend runs an op, and how much workspace the panel driver may take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ssl_kernels import _cuda

BACKENDS = ("auto", "reference", "eager", "cpu", "triton", "cuda")
"""``reference`` is plain dense PyTorch and defines each op; ``eager`` is the memory-linear panel driver with PyTorch
epilogues, on any device; ``cpu`` the C++ kernels; ``triton`` the GPU kernels; ``cuda`` those in CUDA C++, which
``ema_update_`` and ``enqueue_`` have. ``auto`` chooses by device and dtype."""


def _check_backend(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _check_workspace(mb: float, origin: str) -> float:
    if not 0 < mb < float("inf"):
        raise ValueError(f"{origin}: expected a positive number of megabytes, got {mb!r}")
    return mb


def _check_budget(mb: float, origin: str) -> float:
    if not 0 <= mb < float("inf"):
        raise ValueError(f"{origin}: expected a number of megabytes, at least 0, got {mb!r}")
    return mb


def _megabytes(variable: str, default: float, check: Callable[[float, str], float]) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    try:
        return check(value, variable)
    except ValueError as error:
        raise ValueError(f"{str(error).rpartition('got ')[0]}got {text!r}") from None


_backend = _check_backend(os.environ.get("SSL_KERNELS_BACKEND") or "auto", "SSL_KERNELS_BACKEND")
_workspace_mb = _megabytes("SSL_KERNELS_WORKSPACE_MB", 64, _check_workspace)
_tile_budget_mb = _megabytes("SSL_KERNELS_TILE_BUDGET_MB", 64, _check_budget)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block with the backend ``name`` (one of :data:`BACKENDS`), in the whole process.

    The environment variable ``SSL_KERNELS_BACKEND`` sets the default. A backward pass uses the backend of its forward.

    >>> import torch, ssl_kernels
    >>> x = torch.eye(2)
    >>> with ssl_kernels.use_backend("reference"):
    ...     round(ssl_kernels.functional.sigmoid_contrastive_loss(x, x, 10.0, -5.0).item(), 6)
    0.013431
    """
    global _backend
    previous, _backend = _backend, _check_backend(name, "use_backend")
    try:
        yield
    finally:
        _backend = previous


@contextmanager
def use_workspace(mb: float) -> Iterator[None]:
    """Bound the panel driver's workspace to ``mb`` megabytes inside the block, in the whole process.

    The environment variable ``SSL_KERNELS_WORKSPACE_MB`` sets the default, 64 if absent. Panels shrink to fit it; a
    smaller workspace is slower, never wrong.
    """
    global _workspace_mb
    previous, _workspace_mb = _workspace_mb, _check_workspace(mb, "use_workspace")
    try:
        yield
    finally:
        _workspace_mb = previous


@contextmanager
def use_tile_budget(mb: float) -> Iterator[None]:
    """Let a softmax loss keep up to ``mb`` megabytes of similarities from its first pass for its second.

    What is kept need not be computed again: 3 units instead of 4 for CLIP. The default is 64, all of a batch of 4,096
    in fp32, or what the environment variable ``SSL_KERNELS_TILE_BUDGET_MB`` says; 0 turns it off. On the CPU the
    process holds on to this memory for its next step, since fresh pages cost as much time as the products that they
    save; the first loss with a budget of 0 lets it go. So it does with the memory of gradients as large as the logits
    (DINO, iBOT). The Triton kernels keep nothing: on a GPU a product is faster than the memory.
    """
    global _tile_budget_mb
    previous, _tile_budget_mb = _tile_budget_mb, _check_budget(mb, "use_tile_budget")
    try:
        yield
    finally:
        _tile_budget_mb = previous


def workspace_bytes() -> int:
    return int(_workspace_mb * 2**20)


def tile_budget_bytes() -> int:
    return int(_tile_budget_mb * 2**20)


def default_backend() -> str:
    return _backend


def choose_backend(device: str, dtype: torch.dtype, *, in_cuda: bool = False) -> str:
    """The backend that an op will use for features of ``dtype`` on a device of type ``device``.

    ``in_cuda`` tells that the op has a kernel in CUDA C++.
    """
    double = dtype == torch.float64
    if _backend == "auto":
        if double or device not in ("cpu", "cuda"):
            return "eager"
        if device == "cpu":
            return "cpu"
        if in_cuda and not _cuda.missing:
            return "cuda"
        return "triton" if _triton_suits() else "eager"
    if _backend in ("cpu", "triton", "cuda") and double:
        raise ValueError(f"backend {_backend!r} has no float64 kernels: use 'eager' or 'reference'")
    if _backend == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu': expected CPU tensors, got {device}")
    if _backend == "triton" and device != "cuda" and not (device == "cpu" and _interpreting()):
        raise ValueError(f"backend 'triton': expected CUDA tensors, got {device}")
    if _backend == "cuda":
        if not in_cuda:
            raise ValueError("backend 'cuda': this op has no kernel in CUDA C++: use 'auto' or 'triton'")
        if _cuda.missing:
            raise ValueError(f"backend 'cuda': {_cuda.missing}")
        if device != "cuda":
            raise ValueError(f"backend 'cuda': expected CUDA tensors, got {device}")
    return _backend


@torch.compiler.assume_constant_result
def _triton_suits() -> bool:
    """Whether the current GPU is one that Triton supports: for those before Ampere it compiles without tensor cores,
    into code that spills."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability() >= (8, 0)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
