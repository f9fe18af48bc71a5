"""An exponential moving average of a list of tensors, in place: schema, reference, backends and fake.

One pass over all tensors reads targets and sources, each in its own dtype, and writes targets and their copies. Bytes
are all that it costs: 12 per parameter in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ssl_kernels.ops import _checks
from ssl_kernels.settings import choose_backend

KERNELS = ("cpu", "cuda")
_PLAIN = frozenset((Tensor, nn.Parameter))


def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    momentum: Tensor | float,
    copies: Iterable[Tensor | None] | None = None,
) -> None:
    r"""Exponential moving average of a list of tensors, in place: :math:`t \leftarrow m\,t + (1 - m)\,s` for each.

    One call updates all parameters of a model in one pass over memory, whatever their sizes and dtypes. It computes in
    float32, or in float64 if one of a pair is float64. With m = 1 the targets keep every bit, and with m = 0 they
    become the sources, even if they held NaN.

    Args:
        targets: float32, bfloat16, float16 or float64 tensors of any shapes and strides. No gradient flows through
            them. Keep averages in float32: in 16 bits they stop moving once a step is smaller than their rounding.
        sources: as many tensors of the same shapes, each of any of these dtypes. A source may be its own target, but
            must not share memory with other targets.
        momentum: m in [0, 1], a float or a floating-point tensor of one element. A tensor on a GPU is neither read by
            the host nor checked; m = 0 and m = 1 are then exact for finite numbers only.
        copies: for each target a tensor, or None, that receives the new target in its own dtype. An example are
            bfloat16 weights for inference, copied from averages in float32.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects. A
            tensor that would be written twice does not fit.
        RuntimeError: if contiguous tensors overlap and one of them is written. The C++ and CUDA C++ kernels check this;
            float64 tensors, which they do not handle, are not checked.

    All tensors must be on one device. DTensors are paired only if they are sharded alike; each process then updates its
    own part. Integer tensors are refused, because counters have no average; :class:`ssl_kernels.ModelEma` copies them.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722; Tarvainen & Valpola, Mean teachers, 2017,
    arXiv:1703.01780.

    >>> import torch, ssl_kernels.functional as K
    >>> teacher, student = torch.zeros(2), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    >>> copy = torch.empty(2, dtype=torch.float16)
    >>> K.ema_update_([teacher], [student], 0.75, [copy])
    >>> teacher.tolist(), copy.tolist()
    ([0.25, 0.5], [0.25, 0.5])
    """
    into, towards = _as_list("targets", targets), _as_list("sources", sources)
    beside: list[Any] = [None] * len(into) if copies is None else _as_list("copies", copies)
    if _update_plain(into, towards, beside, momentum):
        return
    for name, tensors in (("sources", towards), ("copies", beside)):
        if len(tensors) != len(into):
            raise ValueError(f"{name}: expected {len(into)} tensors as targets has, got {len(tensors)}")
    device = _check(into, towards, beside)
    m = _as_momentum(momentum, device)
    if not into:
        return
    if copies is not None:  # the op takes no optional tensors: those that have a copy come first
        order = sorted(range(len(into)), key=lambda i: beside[i] is None)
        into, towards, beside = ([tensors[i] for i in order] for tensors in (into, towards, beside))
    with torch.no_grad():
        beside = [t for t in beside if t is not None]
        if any(is_sharded(t) for t in into):
            into, towards, beside = ([_local(t) for t in tensors] for tensors in (into, towards, beside))
        double = any(t.dtype == torch.float64 for t in (*into, *towards, *beside))
        backend = choose_backend(device, torch.float64 if double else torch.float32, KERNELS)
        if backend == "reference":
            reference(into, towards, beside, m)
        else:
            _update(into, towards, beside, m, backend)


def _update_plain(targets: list[Any], sources: list[Any], copies: list[Any], momentum: Any) -> bool:
    """The usual case at a third of the overhead: plain tensors straight to the kernel in C++, which checks them.

    Returns False if there is more to it, be it an argument that is wrong; the kernel checks all before it writes.
    """
    if torch.compiler.is_compiling() or type(momentum) is not float or type(next(iter(targets), None)) not in _PLAIN:
        return False
    device = targets[0].device
    backend = choose_backend(device, torch.float32, KERNELS) if device.type in ("cpu", "cuda") else ""
    if backend not in ("cpu", "cuda") or len(copies) != len(targets):
        return False
    if all(copy is None for copy in copies):
        copies = []
    for tensors in (targets, sources, copies):
        if not (_PLAIN.issuperset(map(type, tensors)) and all(map(Tensor.is_contiguous, tensors))):
            return False
    try:
        with torch.no_grad():
            if backend == "cpu":
                torch.ops.ssl_kernels.ema_update_(targets, sources, copies, momentum)
            else:
                torch.ops.ssl_kernels.ema_update_cuda_(targets, sources, copies, momentum, None)
    except RuntimeError:
        return False
    torch.autograd.graph.increment_version((*targets, *copies))
    return True


def _as_list(name: str, tensors: Any) -> list[Any]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    return list(tensors)


def _check(targets: list[Any], sources: list[Any], copies: list[Any]) -> torch.device:
    device = targets[0].device if targets and isinstance(targets[0], Tensor) else torch.device("cpu")
    for name, tensors in (("targets", targets), ("sources", sources), ("copies", copies)):
        for i, (value, target) in enumerate(zip(tensors, targets, strict=True)):
            if value is None and name == "copies":
                continue
            plain = type(value) in _PLAIN and type(target) in _PLAIN
            if (
                not (plain or isinstance(value, Tensor))
                or value.dtype not in _checks.FEATURE_DTYPES
                or value.device != device
                or (value is not target and value.shape != target.shape)
                or not (plain or sharding(value) == sharding(target))
            ):
                raise _mismatch(f"{name}[{i}]", value, f"targets[{i}]", target, device)
    written: set[int] = set()
    for name, tensors in (("targets", targets), ("copies", copies)):
        for i, value in enumerate(tensors):
            if value is None:
                continue
            if id(value) in written:
                raise ValueError(f"{name}[{i}]: expected each tensor once, got one that is written already")
            written.add(id(value))
            if not value.is_contiguous() and any(
                n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)
            ):
                raise ValueError(f"{name}[{i}]: expected memory for each element, got an expanded tensor")
    return device


def _mismatch(name: str, value: Any, target_name: str, target: Tensor, device: torch.device) -> Exception:
    if not isinstance(value, Tensor):
        return TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in _checks.FEATURE_DTYPES:
        return TypeError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.device != device:
        return ValueError(f"{name}: expected the device of targets[0] ({device}), got {value.device}")
    if value.shape != target.shape:
        shapes = f"expected shape {tuple(target.shape)} as {target_name} has, got {tuple(value.shape)}"
        return ValueError(f"{name}: {shapes}")
    return ValueError(f"{name}: expected {sharding(target)} as {target_name} is, got {sharding(value)}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without the half second of importing that class."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


def sharding(tensor: Any) -> str:
    return f"a DTensor of {tensor.placements} on {tensor.device_mesh}" if is_sharded(tensor) else "a plain tensor"


def _local(tensor: Any) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _as_momentum(momentum: Tensor | float, device: torch.device) -> Tensor:
    """A tensor of no dimension, which the host may read if it is on the CPU."""
    if not isinstance(momentum, Tensor):
        _checks.check_fraction("momentum", momentum)
        # As a product it stays a variable of a compiled graph; torch.full would compile anew for each value.
        return torch.ones((), dtype=torch.float64, device="cpu") * momentum
    if momentum.numel() != 1 or not momentum.is_floating_point():
        got = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
        raise ValueError(f"momentum: expected a float or a floating tensor of one element, got {got}")
    if momentum.device.type != "cpu" and momentum.device != device:
        raise ValueError(f"momentum: expected the CPU or the device of targets[0] ({device}), got {momentum.device}")
    return momentum.detach().reshape(())


def _as_number(momentum: Tensor) -> Tensor | float:
    """What the host may know of the momentum, which is nothing on another device."""
    if momentum.device.type != "cpu":
        return momentum
    number = momentum.item()
    _checks.check_fraction("momentum", number)
    return number


def reference(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    """The definition. The first targets have copies; 0 and 1 are exact whatever the numbers, infinities included."""
    m = _as_number(momentum)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        dtype = _checks.accumulation_dtype(torch.promote_types(target.dtype, source.dtype))
        old, new = target.to(dtype), source.to(dtype)
        if isinstance(m, float):  # a number: to copy it to the device would wait for that
            target.copy_(old if m == 1 else new if m == 0 else m * old + (1 - m) * new)
        else:
            m_, weight = m.to(dtype), (1 - m).to(dtype)
            target.copy_(torch.where(m_ == 1, old, torch.where(m_ == 0, new, m_ * old + weight * new)))
        if i < len(copies):
            copies[i].copy_(target)


def _update_eager(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    m = _as_number(momentum)
    alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        # A tensor of weights has the dtype of the targets: 16 bits are too few for a weight.
        exact = 0 < m < 1 if isinstance(m, float) else target.dtype == _checks.accumulation_dtype(target.dtype)
        if exact and target.dtype == source.dtype:
            pair = alike.setdefault(target.dtype, ([], []))
            pair[0].append(target)
            pair[1].append(source)
        else:
            reference([target], [source], [], momentum)
    for dtype, (into, towards) in alike.items():
        weights = 1 - m if isinstance(m, float) else [(1 - m).to(dtype)] * len(into)
        torch._foreach_lerp_(into, towards, weights)
    for copy, target in zip(copies, targets, strict=False):
        copy.copy_(target)


def _dense(
    targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists as contiguous tensors; those that cannot be are updated here and left out."""
    lists: tuple[list[Tensor], list[Tensor], list[Tensor]] = (targets, sources, copies)
    if not all(tensor.is_contiguous() for tensors in lists for tensor in tensors):
        lists = ([], [], [])
        for i, target in enumerate(targets):
            # Elements in the order of the target's memory, such as that of channels_last.
            order = sorted(range(target.dim()), key=target.stride, reverse=True)
            entry = [tensor.permute(order) for tensor in (target, sources[i], *copies[i : i + 1])]
            if all(tensor.is_contiguous() for tensor in entry):
                for tensors, tensor in zip(lists, entry, strict=False):
                    tensors.append(tensor)
            else:
                _update_eager(entry[:1], entry[1:2], entry[2:], momentum)
    return lists


def _update_cpu(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    lists = _dense(targets, sources, copies, momentum)
    if lists[0]:
        torch.ops.ssl_kernels.ema_update_(*lists, _as_number(momentum))


def _update_cuda(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    lists, m = _dense(targets, sources, copies, momentum), _as_number(momentum)
    if not lists[0]:
        return
    if isinstance(m, float):
        torch.ops.ssl_kernels.ema_update_cuda_(*lists, m, None)
    else:
        wide = m if m.dtype == torch.float64 else m.float()
        torch.ops.ssl_kernels.ema_update_cuda_(*lists, 0.0, wide)


# Where there is no kernel in CUDA C++, torch's own for lists of tensors moves as few bytes, list by list.
_BACKENDS: dict[str, Any] = {
    "eager": _update_eager,
    "cpu": _update_cpu,
    "triton": _update_eager,
    "cuda": _update_cuda,
}


@torch.library.custom_op(
    "ssl_kernels::ema_update",
    mutates_args=("targets", "copies"),
    schema="(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] copies, Tensor momentum, str backend) -> ()",
)
def _update(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor, backend: str) -> None:
    _BACKENDS[backend](targets, sources, copies, momentum)


@_update.register_fake
def _(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], momentum: Tensor, backend: str) -> None:
    return None
