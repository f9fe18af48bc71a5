"""The losses of DINOv3's own code, argument for argument. They are those of DINOv2, except for the ones defined here.

If the program has imported ``dinov3.distributed``, the centre, Sinkhorn-Knopp and the distributed KoLeo are over the
processes of ``dinov3.distributed.get_process_subgroup()``, which DINOv3's trainer sets. Otherwise they are over all
processes. For another group, use :class:`ssl_kernels.SinkhornKnopp` and :class:`ssl_kernels.KoLeoLoss`, which take one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import losses
from ssl_kernels.distributed import Ranks, world
from ssl_kernels.integrations import dinov2
from ssl_kernels.integrations.dinov2 import KoLeoLoss

__all__ = ["DINOLoss", "KoLeoLoss", "KoLeoLossDistributed", "SinkhornKnoppTeacher", "iBOTPatchLoss"]


def _process_subgroup() -> dist.ProcessGroup | None:
    """Asked at every use, for DINOv3 makes its groups when it likes; None is all processes."""
    distributed = sys.modules.get("dinov3.distributed")
    return None if distributed is None else distributed.get_process_subgroup()


class DINOLoss(dinov2.DINOLoss):
    """Replaces ``dinov3.loss.DINOLoss``; checkpoints load both ways.

    Args:
        out_dim: number of prototypes K.
        student_temp, center_momentum: the temperature of the student's softmax, and the momentum of the centre.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov3 import DINOLoss
    >>> criterion, logits = DINOLoss(out_dim=16), torch.randn(2, 4, 16)
    >>> probabilities = criterion.sinkhorn_knopp_teacher(logits.flatten(0, 1), teacher_temp=0.07).view(2, 4, 16)
    >>> loss = criterion(logits, probabilities, ignore_diagonal=True)
    """

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return _process_subgroup()

    def forward(self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False) -> Tensor:  # type: ignore[override]
        """The cross-entropy between logits [V, B, K] and probabilities [T, B, K], averaged over pairs of crops and
        samples.

        ``ignore_diagonal`` leaves out the pairs of a crop with itself.
        """
        return K.dino_loss(
            student_logits,
            teacher_probs,
            student_temp=self.student_temp,
            pairs="distinct" if ignore_diagonal else "all",
            teacher_probs=True,
        )


class iBOTPatchLoss(dinov2.iBOTPatchLoss):  # noqa: N801
    """Replaces ``dinov3.loss.iBOTPatchLoss``; checkpoints load both ways.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp, center_momentum: the temperature of the student's softmax, and the momentum of the centre.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov3 import iBOTPatchLoss
    >>> criterion, masks = iBOTPatchLoss(16), torch.tensor([[True, False, True], [False, True, False]])
    >>> student, teacher = torch.randn(3, 16), torch.randn(3, 16)
    >>> assigned = criterion.sinkhorn_knopp_teacher(teacher, 0.07, n_masked_patches_tensor=masks.sum())
    >>> loss = criterion.forward_masked(student, assigned, masks)
    """

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return _process_subgroup()


class SinkhornKnoppTeacher(nn.Module):
    """Replaces ``dinov3.loss.ibot_patch_loss.SinkhornKnoppTeacher``.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov3 import SinkhornKnoppTeacher
    >>> SinkhornKnoppTeacher()(torch.randn(8, 16), teacher_temp=0.07, n_masked_patches_tensor=torch.tensor(8)).shape
    torch.Size([8, 16])
    """

    @torch.no_grad()
    def forward(
        self,
        teacher_output: Tensor,
        teacher_temp: Tensor | float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """The Sinkhorn-Knopp assignment of the rows [N, K] of the subgroup. ``n_masked_patches_tensor`` is not used,
        because the number of rows cancels out."""
        return K.sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=n_iterations, group=_process_subgroup())


class KoLeoLossDistributed(nn.Module):
    """Replaces ``dinov3.loss.KoLeoLossDistributed``, which looks for neighbours among the rows of several processes.

    The gradients are those of DINOv3. The value is the mean over the rows of all these processes, where DINOv3 returns
    the mean over the rows of its own process.

    Args:
        topk: how many neighbours; only 1 is implemented.
        loss_group_size: neighbours are searched within groups of this many rows, held by consecutive processes with
            equal numbers of rows. None means the rows of all processes, which may then have different numbers of them.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov3 import KoLeoLossDistributed
    >>> round(KoLeoLossDistributed()(torch.eye(4)).item(), 4)
    -0.3466
    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        if topk != 1:
            raise ValueError(f"topk: expected 1, the only number that is implemented, got {topk!r}")
        self.topk = topk
        self.loss_group_size = loss_group_size
        self._groups: dict[tuple[int, ...], Any] = {}

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """The loss of features [B, D], normalised here."""
        group = None if world() is None else _process_subgroup() or world()
        if self.loss_group_size is not None:
            group = self._part(group, self.loss_group_size, student_output)
        return losses.KoLeoLoss(eps=eps, group=group)(student_output)

    def _part(self, group: dist.ProcessGroup | None, size: int, x: Tensor) -> dist.ProcessGroup | None:
        """The consecutive processes, this one among them, that have ``size`` rows together."""
        rows, everyone = len(x), [0] if group is None else dist.get_process_group_ranks(group)
        if group is not None:
            Ranks(group.group_name, "KoLeoLossDistributed").agree(
                [rows], {"rows": rows, "loss_group_size": size}, x.device
            )
        if size < 1 or rows < 1 or size % rows or rows * len(everyone) % size:
            raise ValueError(
                f"loss_group_size: expected a multiple of the {rows} rows of a process that divides the "
                f"{rows * len(everyone)} of all, got {size}"
            )
        if group is None:
            return None
        number = size // rows
        first = group.rank() // number * number
        members = tuple(everyone[first : first + number])
        if members not in self._groups:
            self._groups[members] = dist.new_group(list(members), use_local_synchronization=True)
        found: dist.ProcessGroup = self._groups[members]
        return found
