"""A step of a loss on a GPU that need not be there: which kernels it launches, and which operations of torch it calls.

Tensors are fake, of any size and no memory. Triton's kernels are replaced by what counts their launches.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_kernels.kernels import configs, info_nce, key_softmax, sigmoid, softmax_grad, softmax_stats, softmax_summary
from ssl_kernels.ops import info_nce as info_nce_op
from ssl_kernels.ops import matmul, panel_shape, softmax
from ssl_kernels.ops import sigmoid as sigmoid_op
from ssl_kernels.ops.contrastive import NO_DIAGONAL, Finish, _finish_triton
from ssl_kernels.ops.key_softmax import Gradients, _gradients

KERNELS = {
    "sigmoid": (sigmoid, "_sigmoid_panel_kernel"),
    "stats": (softmax_stats, "_softmax_stats_kernel"),
    "merge": (softmax_stats, "_merge_stats_kernel"),
    "grad": (softmax_grad, "_softmax_grad_kernel"),
    "summary": (softmax_summary, "_summary_sums_kernel"),
    "vectors": (softmax_summary, "_summary_vectors_kernel"),
    "scalars": (softmax_summary, "_finish_scalars_kernel"),
    "keys": (key_softmax, "_key_softmax_kernel"),
    "merge keys": (key_softmax, "_merge_splits_kernel"),
    "rows": (info_nce, "_info_nce_rows_kernel"),
    "gradients": (info_nce, "_info_nce_gradients_kernel"),
}
DEVICE = "cuda:0"  # of the tensors of a step
L2_MB = {"sm_80": 40, "sm_90": 50, "sm_100": 126}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
_CACHES = (
    panel_shape._multiprocessors, panel_shape._cached_side, configs.device_traits, matmul._addmm_widens,
    configs.modelled,
)  # fmt: skip
# Operations of torch that give the device nothing to do.
_FREE = {
    "empty", "new_empty", "empty_strided", "as_strided", "slice", "select", "t", "transpose", "view", "unbind", "alias",
    "detach", "expand", "unsqueeze", "permute", "split", "split_with_sizes", "empty_like", "device", "ones",
    "lift_fresh",
}  # fmt: skip
_PRODUCTS = {"addmm", "mm"}


@dataclass
class Counts:
    """Of one step."""

    kernels: Counter[str] = field(default_factory=Counter)  # launches of Triton's, by name
    products: int = 0  # matrix products of torch
    others: Counter[str] = field(default_factory=Counter)  # other operations that launch something
    free: Counter[str] = field(default_factory=Counter)  # views and allocations

    @property
    def allocations(self) -> int:
        return sum(count for name, count in self.free.items() if "empty" in name)

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + self.products + sum(self.others.values())


class Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _FREE:
            self.counts.free[name] += 1
        elif name in _PRODUCTS:
            self.counts.products += 1
        else:
            self.counts.others[name] += 1
        return func(*args, **(kwargs or {}))


class _Kernel:
    def __init__(self, name: str, counts: Counts) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            self.counts.kernels[self.name] += 1

        return launch


@contextlib.contextmanager
def device(chip: str) -> Iterator[None]:
    """A GPU of this kind is there, as far as what we ask of it goes."""
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[chip], L2_cache_size=L2_MB[chip] * 2**20, major=int(chip[3:]) // 10,
        gcnArchName="gfx942",
    )  # fmt: skip
    for cache in _CACHES:
        cache.cache_clear()
    try:
        with (
            mock.patch("torch.cuda.get_device_properties", return_value=properties),
            mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()),
            mock.patch.object(Tensor, "data_ptr", return_value=0),  # aligned
        ):
            yield
    finally:
        for cache in _CACHES:
            cache.cache_clear()


def counted(chip: str, step: Callable[[], object]) -> Counts:
    """What a step does that makes its tensors itself."""
    counts = Counts()
    with contextlib.ExitStack() as stack:
        stack.enter_context(device(chip))
        for name, (module, attribute) in KERNELS.items():
            stack.enter_context(mock.patch.object(module, attribute, _Kernel(name, counts)))
        stack.enter_context(FakeTensorMode())
        matmul._addmm_widens(torch.device("cuda:0"), torch.bfloat16, torch.float32)
        stack.enter_context(Counting(counts))
        step()
    return counts


def features(rows: int, width: int) -> Tensor:
    return torch.ones(rows, width, dtype=torch.bfloat16, device=DEVICE)


def scalar() -> Tensor:
    return torch.ones((), device=DEVICE)


_ALONE = ("", "auto", "mean", False, False)  # as Across: one process


def siglip(batch: int, width: int, workspace_mb: int = 256, **changes: Any) -> None:
    """Loss and gradients, without what autograd adds."""
    x, y, scale, bias = features(batch, width), features(batch, width), scalar(), scalar()
    a = sigmoid_op.Arguments(
        x, y, scale, bias, None, None, False, 0, NO_DIAGONAL, None, "mean", [True] * 4, workspace_mb * 2**20, "triton",
        *_ALONE,
    )._replace(**changes)  # fmt: skip
    made = sigmoid_op._forward(a)
    _finish_triton(Finish(scalar(), scale, made.scalars, made.dx, made.dy, x.dtype))


def clip(batch: int, width: int, workspace_mb: int = 256, **changes: Any) -> None:
    x, y, scale = features(batch, width), features(batch, width), scalar()
    _softmax(x, y, scale, workspace_mb, seam=0, positive=0, excluded=NO_DIAGONAL, **changes)


def nt_xent(batch: int, width: int, workspace_mb: int = 256, **changes: Any) -> None:
    """Of so many pairs: twice as many rows, against themselves."""
    x, scale = features(2 * batch, width), scalar()
    _softmax(x, None, scale, workspace_mb, seam=batch, positive=batch, excluded=0, **changes)


def _softmax(x: Tensor, y: Tensor | None, scale: Tensor, workspace_mb: int, **changes: Any) -> None:
    a = softmax.Arguments(
        x, y, scale, None, None, False, 0, NO_DIAGONAL, None, 0, 0.0, "mean", [True, y is not None, True],
        workspace_mb * 2**20, 0, "triton", "loss", *_ALONE,
    )._replace(**changes)  # fmt: skip
    _, dx, dy, scalars, _ = softmax._forward(a)
    _finish_triton(Finish(scalar(), scale, scalars, dx, dy, x.dtype))


def info_nce_step(batch: int, width: int, workspace_mb: int = 256, keys: int = 65_536) -> None:
    query, positive, queue, scale = features(batch, width), features(batch, width), features(keys, width), scalar()
    a = info_nce_op.Arguments(
        query, positive, queue, scale, False, "mean", True, workspace_mb * 2**20, "triton", *_ALONE
    )
    _, pull, slope = info_nce_op._forward(a)
    _gradients(Gradients(scalar(), slope, query, pull, scale, [True, False, True], "triton"))


STEPS: dict[str, Callable[..., None]] = {
    "SigLIP": siglip, "CLIP": clip, "NT-Xent": nt_xent, "InfoNCE": info_nce_step,
}  # fmt: skip
