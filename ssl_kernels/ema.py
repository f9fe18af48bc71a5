"""The momentum teacher: an exponential moving average of a model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn


class ModelEma(nn.Module):
    r"""A copy of a model whose parameters follow it as :math:`\theta_t \leftarrow m\,\theta_t + (1 - m)\,\theta_s`.

    Calling it calls the copy, :attr:`module`, which is never trained; checkpoints hold it under ``module.``. Copy and
    model are paired by name at every update, so a model that is moved or cast afterwards is followed too; a tied
    parameter is averaged once.

    Args:
        model: what to follow; the copy starts as its equal, in the same mode. Put it into ``eval()`` where needed.
        momentum: m in [0, 1], unless :meth:`update` is given another.
        buffers: "average" treats floating buffers that ``state_dict`` holds (statistics of BatchNorm) as parameters,
            "copy" copies them. Integer buffers and those outside of ``state_dict`` are copied either way.
        dtype: in which the copy is kept, such as float32 for a bfloat16 model: in 16 bits an average stands still once
            a step is less than its rounding. None keeps the model's.

    Raises:
        ValueError: if a momentum is outside of [0, 1], or if the model no longer has the copy's names and shapes.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722; Tarvainen & Valpola, Mean teachers, 2017,
    arXiv:1703.01780.

    >>> import torch
    >>> from ssl_kernels.ema import ModelEma
    >>> student = torch.nn.Linear(2, 1, bias=False)
    >>> teacher = ModelEma(student, momentum=0.75)
    >>> with torch.no_grad():
    ...     _ = teacher.module.weight.fill_(0.0), student.weight.fill_(8.0)
    >>> teacher.update(student)
    >>> teacher(torch.eye(2)).flatten().tolist()
    [2.0, 2.0]
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.999,
        *,
        buffers: Literal["average", "copy"] = "average",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers: expected 'average' or 'copy', got {buffers!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
        self.momentum, self.buffers_are = _checked(momentum), buffers
        self.module = copy.deepcopy(model).to(dtype=dtype).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float | Tensor | None = None) -> None:
        """Move towards ``model``; a ``momentum`` of a schedule may be a tensor of one element, which no host reads."""
        m = self.momentum if momentum is None else _checked(momentum)
        averaged: list[tuple[Tensor, Tensor]] = []
        for (_, kind, target), (_, _, source) in zip(*_matched(self.module, model), strict=True):
            if kind == "parameter" or (kind == "statistic" and self.buffers_are == "average"):
                averaged.append((target, source.to(target)))
            else:
                target.copy_(source)
        if not averaged:
            return
        targets, sources = ([pair[i] for pair in averaged] for i in range(2))
        if isinstance(m, Tensor):
            torch._foreach_lerp_(targets, sources, [(1 - m).to(target) for target in targets])
        else:
            torch._foreach_lerp_(targets, sources, 1 - m)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_are!r}"


_Named = list[tuple[str, str, Tensor]]


def _matched(average: nn.Module, model: nn.Module) -> tuple[_Named, _Named]:
    ours, theirs = list(_named(average)), list(_named(model))
    nothing = ("nothing", "", torch.empty(0))
    for (name, _, target), (other, _, source) in itertools.zip_longest(ours, theirs, fillvalue=nothing):
        if name != other or target.shape != source.shape:
            raise ValueError(
                f"model: expected {name} {list(target.shape)} as the average has, got {other} {list(source.shape)}; "
                "update() takes the model itself, not what wraps it"
            )
    return ours, theirs


def _named(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind and tensor of every parameter and buffer, tied ones once."""
    for name, parameter in module.named_parameters():
        yield name, "parameter", parameter
    # Masks and the like are not averaged: between two infinities there is no middle.
    constants = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers():
        averages = buffer.is_floating_point() and name not in constants
        yield name, "statistic" if averages else "constant", buffer


def _checked(momentum: float | Tensor) -> float | Tensor:
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1 or not momentum.is_floating_point():
            got = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
            raise ValueError(f"momentum: expected a float or a floating tensor of one element, got {got}")
        return momentum.detach().reshape(())
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")
    return float(momentum)
