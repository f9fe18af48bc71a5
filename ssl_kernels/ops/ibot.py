"""Cross-entropy of masked patches (iBOT): one student and one teacher row to a patch, on top of DINO's op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.dino import KERNELS as KERNELS
from ssl_kernels.ops.dino import Options, distill

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def ibot_patch_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = ...,
    *,
    want_teacher_sum: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def ibot_patch_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = ...,
    *,
    want_teacher_sum: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
def ibot_patch_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    student_temp: Tensor | float = 0.1,
    teacher_temp: Tensor | float = 0.04,
    center: Tensor | None = None,
    teacher_probs: bool = False,
    reduction: str = "sum",
    want_teacher_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy of masked patches between student and teacher (iBOT). It receives the masked patches alone.

    .. math:: L = \sum_i w_i \Big( -\sum_k p_{ik} \log \operatorname{softmax}_k(S_i / \tau_s) \Big), \qquad
              p_i = \operatorname{softmax}((T_i - c) / \tau_t)

    Args:
        student, teacher: [N, K] logits of the N masked patches of a batch. Dtypes and strides are as in
            :func:`dino_loss`.
        weights: the weights w, a floating-point tensor [N] without gradient; None means 1. For iBOT's mean over B
            images of the mean over each image's masked patches, pass :math:`w_i = 1 / (B\, n)`, where n is the number
            of masked patches of the image of patch i.
        student_temp, teacher_temp, center, teacher_probs, want_teacher_sum: as in :func:`dino_loss`.
        reduction: "sum" over the patches, or "none" for the loss of each, [N].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 logits), or a pair of the loss and the sum of
        the teacher's logits. The sum over no patches is 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dino_loss`.

    Source: Zhou et al., iBOT, 2021, arXiv:2111.07832; Oquab et al., DINOv2, 2023, arXiv:2304.07193.

    >>> import torch, ssl_kernels.functional as K
    >>> logits = torch.eye(3, 4)
    >>> round(K.ibot_patch_loss(logits, logits, weights=torch.full((3,), 1 / 3)).item(), 6)
    0.000136
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dim() != 2:
            raise ValueError(f"{name}: expected shape [patches, K], got {tuple(value.shape)}")
    _checks.check_choice("reduction", reduction, ("sum", "none"))
    students, teachers = _checks.as_blocks("student", [student]), _checks.as_blocks("teacher", [teacher])
    return distill(
        students,
        teachers,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        weights=_as_weights(weights, student),
        distinct=False,
        teacher_probs=teacher_probs,
        scale=1.0,
        reduction=reduction,
        want_teacher_sum=want_teacher_sum,
    )


def _as_weights(weights: Tensor | None, student: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: expected a floating tensor, got {got}")
    if weights.shape != student.shape[:1]:
        raise ValueError(f"weights: expected shape ({student.shape[0]},), got {tuple(weights.shape)}")
    if weights.device != student.device:
        raise ValueError(f"weights: expected the device of student ({student.device}), got {weights.device}")
    _checks.check_constant("weights", weights)
    return weights.to(_checks.accumulation_dtype(student.dtype)).contiguous()
