"""The losses of DINOv2's own code, argument for argument. The caller computes and stores the teacher's probabilities.
If you may change the caller, pass logits and a centre to :func:`ssl_kernels.functional.dino_loss` and
:func:`ssl_kernels.functional.ibot_patch_loss` instead, which never store the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import losses
from ssl_kernels.losses.center import all_reduce_, checked_momentum, move_, total_of
from ssl_kernels.losses.dino import check_temperatures
from ssl_kernels.losses.ibot import weights_of_mask


class CenteredLoss(nn.Module):
    """The teacher's side: a centre whose all-reduce runs until the next time that it is needed.

    Updates without an :meth:`apply_center_update` between them, as of micro-batches, count as one; an update that waits
    is applied before ``state_dict`` is taken, which all processes are to do alike.
    """

    center: Tensor

    def __init__(self, size: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        check_temperatures(student_temp=student_temp)
        self.student_temp = student_temp
        self.center_momentum = checked_momentum("mean", center_momentum)
        self.register_buffer("center", torch.zeros(size))
        self._waiting: list[tuple[Tensor, dist.Work | None]] = []
        self.register_state_dict_pre_hook(_apply_center_update)
        self.register_load_state_dict_pre_hook(_forget_center_updates)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """Processes that have a centre and an assignment in common; None is all of them."""
        return None

    def init_weights(self) -> None:
        """Set the centre to 0, where it is from the start unless the module was made on the meta device."""
        self.center.zero_()

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: Tensor | float, update_centers: bool = True
    ) -> Tensor:
        """softmax((T - c) / tau) of logits T [..., K], in float32. ``update_centers`` first applies a waiting update of
        c."""
        if update_centers:
            self.apply_center_update()
        return K.centered_softmax(teacher_output, teacher_temp, self.center)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Start to move the centre towards the mean of logits [..., K]; the next use of the centre waits for it."""
        self.reduce_center_update(teacher_output)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor) -> None:
        """What :meth:`update_center` does, under DINOv2's other name."""
        total = total_of(teacher_output)
        self._waiting.append((total, all_reduce_(total, self._group, async_op=True)))

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Wait for the updates that have started, and move the centre."""
        if not self._waiting:
            return
        for _, work in self._waiting:
            if work is not None:
                work.wait()
        move_(self.center, torch.stack([total for total, _ in self._waiting]).sum(0), self.center_momentum)
        self._waiting.clear()


def _apply_center_update(module: CenteredLoss, prefix: str, keep_vars: bool) -> None:
    """A hook that can be pickled, as a lambda cannot."""
    module.apply_center_update()


def _forget_center_updates(module: CenteredLoss, *_: object) -> None:
    module._waiting.clear()


class DINOLoss(CenteredLoss):
    """Replaces ``dinov2.loss.DINOLoss``; checkpoints load both ways.

    Args:
        out_dim: number of prototypes K.
        student_temp, center_momentum: the temperature of the student's softmax, and the momentum of the centre.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov2 import DINOLoss
    >>> criterion, student, teacher = DINOLoss(out_dim=16), torch.randn(8, 4, 16), torch.randn(2, 4, 16)
    >>> assigned = criterion.sinkhorn_knopp_teacher(teacher.flatten(0, 1), teacher_temp=0.07).view(2, 4, 16)
    >>> loss = criterion(list(student), assigned)
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: Tensor | float, n_iterations: int = 3
    ) -> Tensor:
        """The Sinkhorn-Knopp assignment of the rows [N, K] of all processes, which may have different N."""
        return K.sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=n_iterations, group=self._group)

    def forward(
        self,
        student_output_list: Tensor | Sequence[Tensor],
        teacher_out_softmaxed_centered_list: Tensor | Sequence[Tensor],
    ) -> Tensor:
        """The mean cross-entropy between logits [B, K] and probabilities [B, K], summed over all pairs of crops."""
        pairs = len(student_output_list) * len(teacher_out_softmaxed_centered_list)
        loss = K.dino_loss(
            student_output_list,
            teacher_out_softmaxed_centered_list,
            student_temp=self.student_temp,
            pairs="all",
            teacher_probs=True,
        )
        return loss * pairs


class iBOTPatchLoss(CenteredLoss):  # noqa: N801
    """Replaces ``dinov2.loss.iBOTPatchLoss``; checkpoints load both ways.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp, center_momentum: the temperature of the student's softmax, and the momentum of the centre.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov2 import iBOTPatchLoss
    >>> criterion, masks = iBOTPatchLoss(16), torch.tensor([[True, False, True], [False, True, False]])
    >>> student, teacher = torch.randn(3, 16), torch.randn(3, 16)
    >>> assigned = criterion.sinkhorn_knopp_teacher(teacher, 0.07, n_masked_patches_tensor=masks.sum())
    >>> loss = criterion.forward_masked(student, assigned, masks)
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: Tensor | float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """The Sinkhorn-Knopp assignment of the rows [N, K] of all processes. ``n_masked_patches_tensor`` is not used,
        because the number of rows cancels out."""
        return K.sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=n_iterations, group=self._group)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """The cross-entropy between logits and probabilities [B, patches, K]: the mean over images of the mean over
        their masked patches."""
        images = student_masks_flat.shape[0]
        weights = student_masks_flat / (images * student_masks_flat.sum(-1, keepdim=True).clamp(min=1))
        return self._loss(student_patch_tokens.flatten(0, 1), teacher_patch_tokens.flatten(0, 1), weights.flatten())

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The same loss, given the masked patches alone: the first ``n_masked_patches`` rows [N, K] of both tensors.

        ``masks_weight`` [N] is 1 over the number of masked patches of each row's image. If it is None, it is found from
        the mask.
        """
        student = student_patch_tokens_masked[:n_masked_patches]
        teacher = teacher_patch_tokens_masked[:n_masked_patches]
        if masks_weight is None:
            weights = weights_of_mask(student_masks_flat, student)
        else:
            weights = masks_weight / student_masks_flat.shape[0]
        return self._loss(student, teacher, weights)

    def _loss(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        return K.ibot_patch_loss(student, teacher, weights, student_temp=self.student_temp, teacher_probs=True)


class KoLeoLoss(nn.Module):
    """Replaces ``dinov2.loss.KoLeoLoss``.

    >>> import torch
    >>> from ssl_kernels.integrations.dinov2 import KoLeoLoss
    >>> round(KoLeoLoss()(torch.eye(4)).item(), 4)
    -0.3466
    """

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """The loss of features [B, D], normalised here; see :func:`ssl_kernels.functional.koleo_loss`."""
        return losses.KoLeoLoss(eps=eps)(student_output)
