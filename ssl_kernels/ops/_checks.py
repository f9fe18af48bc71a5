"""Argument checks shared by the ops. A message names the argument, what came and what is expected."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_features(**features: Tensor) -> None:
    """[rows, D] matrices of one floating dtype, one device and one D."""
    first_name, first = next(iter(features.items()))
    for name, value in features.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if type(value).__name__ == "DTensor":
            raise TypeError(
                f"{name}: expected this process's rows, as {name}.to_local() and group= give them, got a DTensor"
            )
        if value.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions [rows, features], got shape {tuple(value.shape)}")
        if value.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {value.dtype}")
        if value.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name} ({first.dtype}), got {value.dtype}")
        if value.device != first.device:
            raise ValueError(f"{name}: expected the device of {first_name} ({first.device}), got {value.device}")
        if value.shape[1] != first.shape[1]:
            raise ValueError(f"{name}: expected {first.shape[1]} features as {first_name} has, got {value.shape[1]}")


def check_pairs(
    x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None, same_id: str, offset: int, reduction: str
) -> None:
    """What the losses of rows x against columns y have in common."""
    check_features(x=x, y=y)
    _check_ids(x, y, x_ids, y_ids)
    check_choice("same_id", same_id, ("positive", "ignore"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_offset(offset)


def _check_ids(x: Tensor, y: Tensor, x_ids: Tensor | None, y_ids: Tensor | None) -> None:
    if (x_ids is None) != (y_ids is None):
        raise ValueError(f"{'x_ids' if x_ids is None else 'y_ids'}: expected ids for both x and y, or for neither")
    for name, ids, features in (("x_ids", x_ids, x), ("y_ids", y_ids, y)):
        if ids is not None:
            check_row_ids(name, ids, features)


def check_row_ids(name: str, ids: Tensor, features: Tensor) -> None:
    """int64 [rows of the features], on their device."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    if ids.shape != features.shape[:1]:
        raise ValueError(f"{name}: expected shape ({features.shape[0]},), got {tuple(ids.shape)}")
    if ids.device != features.device:
        raise ValueError(f"{name}: expected device {features.device}, got {ids.device}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float | Real):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")


def check_eps(eps: float) -> None:
    check_numbers(eps=eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a positive number, got {eps}")


def check_fraction(name: str, value: float) -> None:
    check_numbers(**{name: value})
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def _check_offset(offset: int) -> None:
    if not isinstance(offset, int) or isinstance(offset, bool):
        raise TypeError(f"offset: expected an int, got {type(offset).__name__}")
    if abs(offset) > 2**62:
        raise ValueError(f"offset: expected at most 2**62 in magnitude, got {offset}")


def check_transforms(*tensors: Tensor) -> None:
    """Reverse-mode autograd is all that fused losses support; anything else must not pass in silence."""
    if torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return
    for tensor in tensors:
        if is_functorch_wrapped_tensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "ssl_kernels: fused losses support neither forward-mode AD nor torch.func transforms; run the loss "
                "inside `with ssl_kernels.use_backend('reference'):`"
            )


def as_blocks(name: str, crops: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Crops as blocks [n, B, K] of one dtype, device, B and K; those given as [B, K] become blocks of one."""
    if not isinstance(crops, Tensor | Sequence):
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(crops).__name__}")
    blocks = [crops] if isinstance(crops, Tensor) else list(autocast_widest(*crops))
    if not blocks:
        raise ValueError(f"{name}: expected at least one crop, got an empty list")
    for i, block in enumerate(blocks):
        label = name if isinstance(crops, Tensor) else f"{name}[{i}]"
        if not isinstance(block, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(block).__name__}")
        if block.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{label}: expected dtype float32, bfloat16, float16 or float64, got {block.dtype}")
        if block.dim() == 2 and not isinstance(crops, Tensor):
            blocks[i] = block = block[None]
        if block.dim() != 3:
            wanted = "[crops, B, K]" if isinstance(crops, Tensor) else "[B, K] or [crops, B, K]"
            raise ValueError(f"{label}: expected shape {wanted}, got {tuple(block.shape)}")
        first = blocks[0]
        if block.dtype != first.dtype:
            raise TypeError(f"{label}: expected the dtype of {name}[0] ({first.dtype}), got {block.dtype}")
        if block.device != first.device:
            raise ValueError(f"{label}: expected the device of {name}[0] ({first.device}), got {block.device}")
        if block.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{label}: expected [B, K] = {tuple(first.shape[1:])} as {name}[0] has, got {tuple(block.shape[1:])}"
            )
    if sum(len(block) for block in blocks) == 0:
        raise ValueError(f"{name}: expected at least one crop, got shape {tuple(blocks[0].shape)}")
    return blocks


def check_constant(name: str, value: object) -> None:
    """What comes from the teacher receives no gradient: a tensor that wants one is a mistake."""
    for tensor in value if isinstance(value, list) else [value]:
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it; detach() it")


def as_center(center: Tensor | None, width: int, teacher: Tensor) -> Tensor | None:
    """[K] in the accumulation dtype, whatever its shape was."""
    if center is None:
        return None
    if not isinstance(center, Tensor) or not center.is_floating_point():
        got = center.dtype if isinstance(center, Tensor) else type(center).__name__
        raise TypeError(f"center: expected a floating tensor, got {got}")
    if center.numel() != width:
        raise ValueError(f"center: expected {width} elements, one to a prototype, got shape {tuple(center.shape)}")
    if center.device != teacher.device:
        raise ValueError(f"center: expected the device of teacher ({teacher.device}), got {center.device}")
    return center.detach().reshape(width).to(accumulation_dtype(teacher.dtype)).contiguous()


def as_scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-dim tensor on the device of ``like``, in its accumulation dtype, in the graph of ``value``."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a float or a floating tensor of one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.dim() == 0 and value.dtype == dtype and value.device == like.device:
            return value
        return value.reshape(()).to(device=like.device, dtype=dtype)
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name}: expected a float or a tensor of one element, got {type(value).__name__}")
    if torch.compiler.is_compiling():  # what fills a tensor is a constant of the graph, made anew for each value
        return torch.ones((), dtype=dtype, device=like.device) * float(value)
    return torch.full((), float(value), dtype=dtype, device=like.device)


def as_softmax_scale(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """As :func:`as_scalar`, and a float must not be negative; a tensor is not read: that would wait for the device."""
    if isinstance(value, int | float | Real) and value < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")
    return as_scalar(name, value, like)


def as_temperature(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """As :func:`as_scalar`, and a float must be positive; a tensor is not read, for that would wait for the device."""
    _check_positive(name, value)
    return as_scalar(name, value, like)


def _check_positive(name: str, value: Tensor | float) -> None:
    if isinstance(value, int | float | Real) and not isinstance(value, bool) and not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def as_inverse_temperature(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """1 over :func:`as_temperature`, at the cost of one tensor where the value is a float."""
    if type(value) is float and value > 0:
        return as_scalar(name, 1 / value, like)
    return 1 / as_temperature(name, value, like)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_features(*features: Tensor) -> tuple[Tensor, ...]:
    """Features in the dtype that autocast gives a matrix product, where autocast is on; float64 is left alone."""
    device = _autocast_device(features)
    if device is None:
        return features
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(f.to(dtype) if isinstance(f, Tensor) and f.dtype in eligible else f for f in features)


def autocast_widest(*features: Tensor) -> tuple[Tensor, ...]:
    """Features in the widest of their dtypes, as autocast casts what is added or stacked, where autocast is on."""
    dtypes = {f.dtype for f in features if isinstance(f, Tensor) and f.dtype in FEATURE_DTYPES}
    if len(dtypes) < 2 or _autocast_device(features) is None:
        return features
    widest = functools.reduce(torch.promote_types, dtypes)
    return tuple(f.to(widest) if isinstance(f, Tensor) and f.dtype in dtypes else f for f in features)


def _autocast_device(features: Sequence[Tensor]) -> str | None:
    """The type of their device if autocast is on there."""
    device = features[0].device.type if features and isinstance(features[0], Tensor) else "cpu"
    # Of these nobody needs to ask, and torch.compile of torch 2.10 and 2.11 cannot trace the question.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return device if available and torch.is_autocast_enabled(device) else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Products inside keep the dtype that they are given."""
    device = _autocast_device((x,))
    return contextlib.nullcontext() if device is None else torch.autocast(device, enabled=False)
