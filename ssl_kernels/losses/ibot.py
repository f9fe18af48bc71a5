"""iBOT loss module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.center import Center, as_total, forget_waiting, step_
from ssl_kernels.losses.dino import check_temperatures


class IBOTPatchLoss(nn.Module):
    r"""Cross-entropy of masked patches with a moving centre (iBOT); replaces ``lightly.loss.IBOTPatchLoss``.

    :math:`L = \frac{1}{B} \sum_b \frac{1}{n_b} \sum_{i \in b} -\sum_k p_{ik} \log \operatorname{softmax}_k(S_i/\tau_s)`
    with :math:`p_i = \operatorname{softmax}((T_i - c) / \tau_t)` over the :math:`n_b` masked patches of each of B
    images. See :func:`ssl_kernels.functional.ibot_patch_loss`. The centre moves as that of
    :class:`ssl_kernels.DINOLoss` does; ``state_dict`` names it ``center.center``.

    Args:
        output_dim: number of prototypes K.
        teacher_temp, student_temp: the temperatures :math:`\tau_t` and :math:`\tau_s`.
        center_mode: "mean", the only mode there is.
        center_momentum: m, how slowly the centre moves.
        group: the processes that share a centre, as in :class:`ssl_kernels.DINOLoss`.

    Raises:
        ValueError: if a temperature is not positive, m not in [0, 1] or the mode not "mean".

    Source: Zhou et al., iBOT, 2021, arXiv:2111.07832; Oquab et al., DINOv2, 2023, arXiv:2304.07193.

    >>> import torch
    >>> from ssl_kernels import IBOTPatchLoss
    >>> mask = torch.tensor([[[True, True], [False, False]], [[False, True], [False, False]]])  # of two images
    >>> logits = torch.eye(3, 4)  # of the three masked patches, image by image
    >>> round(IBOTPatchLoss(output_dim=4)(logits, logits, mask).item(), 6)
    0.000136
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        group: Group = None,
    ) -> None:
        super().__init__()
        check_temperatures(teacher_temp=teacher_temp, student_temp=student_temp)
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.center = Center((1, output_dim), center_mode, center_momentum, group=group)
        self._waiting: Tensor | None = None  # of the micro-batches of an unfinished step
        self.register_load_state_dict_pre_hook(forget_waiting)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: Tensor | float | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """The loss of a batch. Afterwards the centre moves, which the next batch will see.

        Args:
            teacher_out: logits [N, K] of the masked patches, image by image. They get no gradient.
            student_out: the student's logits, likewise, with a gradient.
            mask: boolean [B, H, W], True for the N masked patches. On a GPU nobody checks their number, because
                counting them would wait for the device; if they are not N, the loss is NaN.
            teacher_temp: the teacher's temperature, instead of the constructor's.
            accumulate: as in :class:`ssl_kernels.DINOLoss`.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a boolean tensor [B, H, W], got {got}")
        loss, teacher_sum = K.ibot_patch_loss(
            student_out,
            teacher_out.detach(),
            weights_of_mask(mask.flatten(1), student_out),
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp if teacher_temp is None else teacher_temp,
            center=self.center.center,
            want_teacher_sum=True,
        )
        if self.training:
            with torch.no_grad():
                total = as_total(teacher_sum, teacher_out.shape[0])
                center = self.center
                self._waiting = step_(center.center, self._waiting, total, center.momentum, accumulate, center.group)
        return loss

    def extra_repr(self) -> str:
        return (
            f"output_dim={self.center.center.numel()}, teacher_temp={self.teacher_temp}, "
            f"student_temp={self.student_temp}, center_momentum={self.center.momentum}"
        )


def weights_of_mask(mask: Tensor, rows: Tensor) -> Tensor:
    """1 / (B n) for each row [N, K], which is one of the n masked patches of an image in ``mask`` [B, patches].

    The image of a row is found among the sums of the counts: selecting by the mask would wait for the device.
    """
    images, patches = mask.shape[0], rows.shape[0]
    counts = mask.sum(1)
    masked = counts.sum()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and masked != patches:
        raise ValueError(f"mask: expected {patches} masked patches, one to a row of logits, got {masked}")
    image = torch.searchsorted(counts.cumsum(0), torch.arange(patches, device=mask.device), right=True)
    weights = 1.0 / (images * counts[image.clamp(max=images - 1)])
    return torch.where(masked == patches, weights, torch.nan)
