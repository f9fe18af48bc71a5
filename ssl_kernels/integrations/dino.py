"""The loss of DINO's own code, argument for argument."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.losses.center import as_total, checked_momentum, step_, total_of
from ssl_kernels.losses.dino import check_temperatures
from ssl_kernels.schedules import linear_warmup


class DINOLoss(nn.Module):
    """Replaces ``DINOLoss`` of ``main_dino.py``; checkpoints load both ways.

    See :func:`ssl_kernels.functional.dino_loss`. Unlike Meta's class, this one works without ``torch.distributed``.
    With several processes the centre follows the mean over all of them; they may have different numbers of samples.

    Args:
        out_dim: number of prototypes K.
        ncrops: the number V of the student's crops; the first two are the teacher's.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature goes linearly
            from the first to the second in the warm-up epochs and stays there for the rest of ``nepochs``.
        student_temp, center_momentum: the temperature of the student's softmax, and the momentum of the centre.

    >>> import torch
    >>> from ssl_kernels.integrations.dino import DINOLoss
    >>> criterion = DINOLoss(16, 4, 0.04, 0.07, warmup_teacher_temp_epochs=2, nepochs=9)
    >>> student, teacher = torch.randn(4 * 8, 16, requires_grad=True), torch.randn(2 * 8, 16)
    >>> criterion(student, teacher, epoch=0).backward()
    >>> criterion.center.shape
    torch.Size([1, 16])
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        check_temperatures(
            warmup_teacher_temp=warmup_teacher_temp, teacher_temp=teacher_temp, student_temp=student_temp
        )
        self.student_temp = student_temp
        self.center_momentum = checked_momentum("mean", center_momentum)
        self.ncrops = ncrops
        steps = warmup_teacher_temp_epochs
        warmup = [linear_warmup(epoch, max(1, steps - 1), warmup_teacher_temp, teacher_temp) for epoch in range(steps)]
        self.teacher_temp_schedule = warmup + [teacher_temp] * (nepochs - steps)
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The loss of ``student_output`` [V B, K] and ``teacher_output`` [2 B, K], ordered crop by crop. Then the
        centre moves."""
        for name, logits, crops in (("student", student_output, self.ncrops), ("teacher", teacher_output, 2)):
            if logits.dim() != 2 or logits.shape[0] % crops:
                raise ValueError(f"{name}_output: expected shape [{crops} B, K], got {tuple(logits.shape)}")
        loss, teacher_sum = K.dino_loss(
            student_output.unflatten(0, (self.ncrops, student_output.shape[0] // self.ncrops)),
            teacher_output.detach().unflatten(0, (2, teacher_output.shape[0] // 2)),
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp_schedule[epoch],
            center=self.center,
            want_teacher_sum=True,
        )
        self._move(as_total(teacher_sum, teacher_output.shape[0]))
        return loss

    def update_center(self, teacher_output: Tensor) -> None:
        """Move the centre towards the mean of logits [rows, K]. Calling the module does this already."""
        self._move(total_of(teacher_output))

    @torch.no_grad()
    def _move(self, total: Tensor) -> None:
        step_(self.center, None, total, self.center_momentum)
