"""DINO loss module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.center import as_total, checked_momentum, forget_waiting, step_, total_of
from ssl_kernels.schedules import linear_warmup


class DINOLoss(nn.Module):
    r"""Self-distillation of DINO with a moving centre; replaces ``lightly.loss.DINOLoss``.

    :math:`L = \frac{1}{P B} \sum_{t \ne v, b} -\sum_k p_{tbk} \log \operatorname{softmax}_k(S_{vb} / \tau_s)` with
    :math:`p_{tb} = \operatorname{softmax}((T_{tb} - c) / \tau_t)` over the P pairs of crops, and then
    :math:`c \leftarrow m c + (1 - m) \operatorname{mean}_{tb} T_{tb}`. See :func:`ssl_kernels.functional.dino_loss`.

    The mean for the centre is over the samples of all processes of the group, which may have different numbers of them.
    The centre, of shape (1, 1, K), is part of ``state_dict``. Unlike lightly's, it does not move in evaluation mode.
    Keep it in float32: in 16 bits it stops moving once a step is smaller than its rounding.

    Args:
        output_dim: number of prototypes K.
        warmup_teacher_temp, teacher_temp: the teacher's temperature rises linearly from the first to the second over
            the first ``warmup_teacher_temp_epochs`` epochs. Calls that do not say the epoch use ``teacher_temp``.
        student_temp: the student's temperature :math:`\tau_s`.
        center_momentum: m, how slowly the centre moves.
        center_mode: "mean", the only mode there is.
        group: the processes that share a centre, a ``ProcessGroup`` or a ``DeviceMesh``; None means all.

    Raises:
        ValueError: if a temperature is not positive, m not in [0, 1] or the mode not "mean".

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.

    >>> import torch
    >>> from ssl_kernels import DINOLoss
    >>> criterion = DINOLoss(output_dim=4)
    >>> teacher = list(torch.eye(3, 4).repeat(2, 1, 1))  # two global crops
    >>> student = teacher + list(torch.eye(3, 4).repeat(6, 1, 1))  # and six local ones
    >>> round(criterion(teacher, student).item(), 6)
    0.000136
    >>> criterion.center.flatten()
    tensor([0.0333, 0.0333, 0.0333, 0.0000])
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        group: Group = None,
    ) -> None:
        super().__init__()
        self.group = group
        check_temperatures(
            warmup_teacher_temp=warmup_teacher_temp, teacher_temp=teacher_temp, student_temp=student_temp
        )
        self.warmup_teacher_temp = warmup_teacher_temp
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.center_momentum = checked_momentum(center_mode, center_momentum)
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self._waiting: Tensor | None = None  # of the micro-batches of an unfinished step
        self.register_load_state_dict_pre_hook(forget_waiting)

    def forward(
        self,
        teacher_out: Tensor | Sequence[Tensor],
        student_out: Tensor | Sequence[Tensor],
        teacher_temp: Tensor | float | None = None,
        epoch: int | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """The loss of a batch. Afterwards the centre moves, which the next batch will see.

        Args:
            teacher_out: logits of T crops, as a sequence of [B, K] or as one tensor [T, B, K]. They get no gradient.
            student_out: logits of V crops, likewise. The teacher's crops come first, in the same order.
            teacher_temp: the teacher's temperature, instead of the schedule's.
            epoch: the epoch for the schedule, counted from 0.
            accumulate: True for every micro-batch but the last before an optimizer step. The centre then moves once,
                with the last, towards the mean over all of them.
        """
        if teacher_temp is None:
            teacher_temp, steps = self.teacher_temp, self.warmup_teacher_temp_epochs
            if epoch is not None and epoch < 0:
                raise ValueError(f"epoch: expected at least 0, got {epoch}")
            if epoch is not None and epoch < steps:  # not from a list: torch.compile would make a graph for each epoch
                teacher_temp = linear_warmup(epoch, max(1, steps - 1), self.warmup_teacher_temp, teacher_temp)
        loss, teacher_sum = K.dino_loss(
            student_out,
            teacher_out.detach() if isinstance(teacher_out, Tensor) else [crop.detach() for crop in teacher_out],
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
            center=self.center,
            want_teacher_sum=True,
        )
        if self.training:
            rows = sum(crop.numel() // crop.shape[-1] for crop in teacher_out)
            self._move(as_total(teacher_sum, rows), accumulate)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean of logits [T, B, K]. Calling the module does this already."""
        self._move(total_of(teacher_out))

    @torch.no_grad()
    def _move(self, total: Tensor, more: bool = False) -> None:
        self._waiting = step_(self.center, self._waiting, total, self.center_momentum, more, self.group)

    def extra_repr(self) -> str:
        return (
            f"output_dim={self.center.numel()}, teacher_temp={self.teacher_temp}, student_temp={self.student_temp}, "
            f"center_momentum={self.center_momentum}"
        )


def check_temperatures(**temperatures: float) -> None:
    for name, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
