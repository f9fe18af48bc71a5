"""The moving mean of a teacher's logits, which DINO and iBOT subtract from them. A total [K + 1] is a sum of logits [K]
followed by the number of rows in it. Totals of micro-batches and of processes can be added, however many rows each of
them has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_kernels.distributed import Group, process_group
from ssl_kernels.ops._checks import accumulation_dtype


class Center(nn.Module):
    """The centre of lightly's losses that hold it in a module: c <- m c + (1 - m) mean of the teacher's logits."""

    center: Tensor

    def __init__(
        self, size: tuple[int, ...], mode: str = "mean", momentum: float = 0.9, *, group: Group = None
    ) -> None:
        super().__init__()
        self.group = group
        self.momentum = checked_momentum(mode, momentum)
        self.register_buffer("center", torch.zeros(size))

    @property
    def value(self) -> Tensor:
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move towards the mean of the logits [..., K] of all processes of the group."""
        step_(self.center, None, total_of(x), self.momentum, group=self.group)


def checked_momentum(mode: str, momentum: float) -> float:
    if mode != "mean":
        raise ValueError(f"center_mode: expected 'mean', got {mode!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"center_momentum: expected a number in [0, 1], got {momentum!r}")
    return momentum


def as_total(teacher_sum: Tensor, rows: int) -> Tensor:
    return torch.cat([teacher_sum, teacher_sum.new_full((1,), rows)])


def total_of(teacher: Tensor) -> Tensor:
    """The total of logits [..., K]."""
    rows = teacher.detach().flatten(0, -2)
    return as_total(rows.sum(0, dtype=accumulation_dtype(rows.dtype)), rows.shape[0])


def step_(
    center: Tensor, waiting: Tensor | None, total: Tensor, momentum: float, more: bool = False, group: Group = None
) -> Tensor | None:
    """Add to the waiting total. If ``more`` micro-batches follow, return it; otherwise move the centre and return
    None."""
    total = total if waiting is None else waiting + total
    if more:
        return total
    all_reduce_(total, group)
    move_(center, total, momentum)
    return None


def forget_waiting(module: Any, *_: object) -> None:
    """Drop the waiting total before a checkpoint is loaded, because it belongs to the run before."""
    module._waiting = None


def all_reduce_(total: Tensor, group: Group = None, async_op: bool = False) -> dist.Work | None:
    """Sum over the processes, in place; with ``async_op`` it is there after the ``wait()`` of what is returned."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    work: dist.Work | None = dist.all_reduce(total, group=process_group(group), async_op=async_op)
    return work


def move_(center: Tensor, total: Tensor, momentum: float) -> None:
    """Move the centre in place. It stays where it is if no process has a row."""
    old = center.flatten().to(total.dtype)
    new = torch.lerp(old, total[:-1] / total[-1], 1 - momentum)
    center.copy_(torch.where(total[-1] > 0, new, old).view_as(center))
