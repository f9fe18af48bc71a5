"""Settings: which backend runs an op, and how much workspace the panel driver may take."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

from ssl_kernels import _cuda

T = TypeVar("T")
D = TypeVar("D", float, None)

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


def _megabytes(variable: str, default: D, check: Callable[[float, str], float]) -> float | D:
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


class _Block(Generic[T]):
    """A block of code under a value. Compared by identity, so that blocks may be left in any order."""

    def __init__(self, value: T) -> None:
        self.value = value


class _Setting(Generic[T]):
    """A default of the process, and blocks of code that override it in their context: a thread, or an asyncio task."""

    def __init__(self, default: T) -> None:
        self.default = default
        self._context: ContextVar[tuple[_Block[T], ...]] = ContextVar("ssl_kernels", default=())
        # For torch.compile, which reads no context before torch 2.14: the blocks of all contexts, and those that are
        # entered within the graph.
        self._anywhere: tuple[_Block[T], ...] = ()
        self._traced: tuple[_Block[T], ...] = ()

    def get(self) -> T:
        blocks = self._traced or self._anywhere if torch.compiler.is_compiling() else self._context.get()
        return blocks[-1].value if blocks else self.default

    @contextmanager
    def block(self, value: T) -> Iterator[None]:
        block = _Block(value)
        if torch.compiler.is_compiling():
            before, self._traced = self._traced, (*self._traced, block)
            try:
                yield
            finally:
                self._traced = before
            return
        self._context.set((*self._context.get(), block))
        with _lock:
            self._anywhere = (*self._anywhere, block)
        try:
            yield
        finally:
            self._context.set(_without(block, self._context.get()))
            with _lock:
                self._anywhere = _without(block, self._anywhere)


def _without(block: _Block[T], blocks: tuple[_Block[T], ...]) -> tuple[_Block[T], ...]:
    return tuple(other for other in blocks if other is not block)


_lock = threading.Lock()
_backend = _Setting(_check_backend(os.environ.get("SSL_KERNELS_BACKEND") or "auto", "SSL_KERNELS_BACKEND"))
WORKSPACE_MB, CUDA_WORKSPACE_MB = 64.0, 256.0  # where nobody has set another
_workspace_mb = _Setting(_megabytes("SSL_KERNELS_WORKSPACE_MB", None, _check_workspace))
_tile_budget_mb = _Setting(_megabytes("SSL_KERNELS_TILE_BUDGET_MB", 64, _check_budget))


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every op inside the block with the backend ``name`` (one of :data:`BACKENDS`).

    The block affects its own thread or asyncio task only. :func:`set_defaults` and the environment variable
    ``SSL_KERNELS_BACKEND`` set the backend outside of blocks, in all threads. Use those if other threads run the
    forward pass, as with ``DataParallel``, or run it again, as with activation checkpointing. A call chooses its
    backend once, and its backward pass uses the same. A graph of ``torch.compile`` uses the backend of the block that
    was entered last in the whole process.

    >>> import torch, ssl_kernels
    >>> x = torch.eye(2)
    >>> with ssl_kernels.use_backend("reference"):
    ...     round(ssl_kernels.functional.sigmoid_contrastive_loss(x, x, 10.0, -5.0).item(), 6)
    0.013431
    """
    return _backend.block(_check_backend(name, "use_backend"))


def use_workspace(mb: float) -> AbstractContextManager[None]:
    """Limit the workspace of every op inside the block to ``mb`` megabytes.

    A tile of similarities and a panel of features take at most this much each. A smaller workspace is slower, never
    wrong: on a CPU and in one process, softmax over rows takes three matrix products where a tile of 256 rows and
    all candidates fits it, else four. The environment variable ``SSL_KERNELS_WORKSPACE_MB`` sets the default.
    Without it the default is 64, and 256 on a GPU, where launches cost the host more than memory does. Which
    threads the block affects is told at :func:`use_backend`.
    """
    return _workspace_mb.block(_check_workspace(mb, "use_workspace"))


def use_tile_budget(mb: float) -> AbstractContextManager[None]:
    """Let softmax losses keep up to ``mb`` megabytes of similarities from their first pass for their second.

    What is kept need not be computed again: CLIP then takes three matrix products instead of four. The environment
    variable ``SSL_KERNELS_TILE_BUDGET_MB`` sets the default. Without it the default is 64, which holds all of a batch
    of 4,096 in float32; 0 keeps nothing. On the CPU, the process holds on to this memory for its next step, because
    fresh memory costs as much time as it saves. It does the same with gradients as large as the logits (DINO, iBOT),
    and with the tile of a softmax over rows. The next of these losses releases its memory if the budget is 0. The
    Triton kernels keep nothing, because on a GPU a product is faster than the memory. Which threads the block affects
    is told at :func:`use_backend`.
    """
    return _tile_budget_mb.block(_check_budget(mb, "use_tile_budget"))


def set_defaults(
    *, backend: str | None = None, workspace_mb: float | None = None, tile_budget_mb: float | None = None
) -> None:
    """Set the defaults of the whole process, outside of ``with`` blocks such as :func:`use_backend`.

    Args:
        backend: as in :func:`use_backend`; None leaves it as it is, as for the others.
        workspace_mb: as in :func:`use_workspace`.
        tile_budget_mb: as in :func:`use_tile_budget`.

    Raises:
        ValueError: if a value does not fit; the message names the setting. No setting is changed then.

    >>> import ssl_kernels
    >>> ssl_kernels.set_defaults(backend="auto", workspace_mb=64)
    """
    if backend is not None:
        _check_backend(backend, "backend")
    if workspace_mb is not None:
        _check_workspace(workspace_mb, "workspace_mb")
    if tile_budget_mb is not None:
        _check_budget(tile_budget_mb, "tile_budget_mb")
    _backend.default = _backend.default if backend is None else backend
    _workspace_mb.default = _workspace_mb.default if workspace_mb is None else workspace_mb
    _tile_budget_mb.default = _tile_budget_mb.default if tile_budget_mb is None else tile_budget_mb


def workspace_bytes(device: torch.device) -> int:
    mb = _workspace_mb.get()
    if mb is None:
        mb = CUDA_WORKSPACE_MB if device.type == "cuda" else WORKSPACE_MB
    return int(mb * 2**20)


def tile_budget_bytes() -> int:
    return int(_tile_budget_mb.get() * 2**20)


def current_backend() -> str:
    return _backend.get()


def choose_backend(device: torch.device, dtype: torch.dtype, kernels: Sequence[str]) -> str:
    """The backend that an op will use for features of ``dtype`` on ``device``.

    ``kernels`` are the backends, of "cpu", "triton" and "cuda", for which the op has kernels: ``KERNELS`` of its file.
    """
    backend, double = current_backend(), dtype == torch.float64
    if backend == "auto":
        if double or device.type not in ("cpu", "cuda"):
            return "eager"
        if device.type == "cpu":
            return "cpu" if "cpu" in kernels else "eager"
        if "cuda" in kernels and not _cuda.missing:
            return "cuda"
        return "triton" if "triton" in kernels and _triton_suits(device.index) else "eager"
    if backend in ("reference", "eager"):
        return backend
    if double:
        raise ValueError(f"backend {backend!r} has no float64 kernels: use 'eager' or 'reference'")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu': expected CPU tensors, got {device.type}")
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
        raise ValueError(f"backend 'triton': expected CUDA tensors, got {device.type}")
    if backend == "cuda":
        if "cuda" not in kernels:
            raise ValueError("backend 'cuda': this op has no kernel in CUDA C++: use 'auto' or 'triton'")
        if _cuda.missing:
            raise ValueError(f"backend 'cuda': {_cuda.missing}")
        if device.type != "cuda":
            raise ValueError(f"backend 'cuda': expected CUDA tensors, got {device.type}")
    return backend if backend in kernels else "eager"


def _triton_suits(index: int | None) -> bool:
    """Whether this GPU, or None for the current one, is one that Triton supports: for those before Ampere it compiles
    without tensor cores, into code that spills."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(index) >= (8, 0)


# As torch.compiler.assume_constant_result does, whose import of torch._dynamo would double the time of ours.
_triton_suits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
