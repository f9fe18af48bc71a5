"""The fused operations as functions. ``import ssl_kernels.functional as K``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch.distributed as dist
from torch import Tensor

from ssl_kernels.ops import (
    albef,
    barlow_twins,
    clip,
    dino,
    ibot,
    info_nce,
    koleo,
    nt_xent,
    sigmoid,
    sinkhorn,
    sup_con,
    vicreg,
)
from ssl_kernels.ops import ema as _ema
from ssl_kernels.ops import key_softmax as _key_softmax
from ssl_kernels.ops import queue as _queue

__all__ = [
    "albef_contrastive_loss",
    "barlow_twins_loss",
    "centered_softmax",
    "clip_loss",
    "dino_loss",
    "ema_update_",
    "enqueue_",
    "ibot_patch_loss",
    "info_nce_loss",
    "key_softmax",
    "koleo_loss",
    "nt_xent_loss",
    "sigmoid_contrastive_loss",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "sup_con_loss",
    "vicreg_loss",
]


def sigmoid_contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    r"""Pairwise sigmoid loss of SigLIP, in memory linear in the batch, with exact gradients.

    .. math:: L = \frac{1}{M} \sum_{ij} \operatorname{softplus}(-s_{ij} (t\, x_i \cdot y_j + b)),
              \qquad s_{ij} = +1 \text{ on positives}, -1 \text{ elsewhere}

    Args:
        x: [M, D] features (images), float32, bfloat16, float16 or float64, any strides. Normalise them first; the
            function does not.
        y: [N, D] features (texts), of the dtype and device of ``x``.
        scale: t > 0, already exponentiated, a float or a floating tensor of one element; gradients flow to tensors.
        bias: b, likewise. SigLIP starts from t = 10, b = -10.
        x_ids, y_ids: int64 [M] and [N], both or neither. Pairs with equal ids are positive (``same_id="positive"``)
            or left out of the sum (``same_id="ignore"``).
        offset: pair (i, i + offset) is always positive, whatever the ids say; out of range it is no pair.
        reduction: "mean" divides the sum over all pairs by M, "sum" does not, "none" gives the sum of each row, [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Under autocast, ``x`` and ``y`` are cast as for a matrix product; the loss is still accumulated in float32.
    float32 products follow ``torch.get_float32_matmul_precision()``. Between forward and backward the sums of the
    gradients that are needed are kept, [M, D] and [N, D] in float32. A tile, and a panel of features, take at most
    ``SSL_KERNELS_WORKSPACE_MB`` (default 64) megabytes each; see :func:`ssl_kernels.use_workspace`.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, arXiv:2303.15343.

    >>> import torch, ssl_kernels.functional as K
    >>> x = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2), dim=-1).requires_grad_()
    >>> y = x.detach().flip(1)
    >>> loss = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(x.grad.shape)
    (4.0231, (4, 2))
    """
    return sigmoid.sigmoid_contrastive_loss(
        x, y, scale, bias, x_ids=x_ids, y_ids=y_ids, same_id=same_id, offset=offset, reduction=reduction
    )


def clip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    offset: int = 0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Symmetric softmax contrastive loss of CLIP, in memory linear in the batch, with exact gradients.

    .. math:: L = \frac{1}{2 M} \sum_i \Big[ \log \sum_j e^{z_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i} z_{ij} \Big]
                + \frac{1}{2 N} \sum_j \Big[ \log \sum_i e^{z_{ij}} - \frac{1}{|P_j|} \sum_{i \in P_j} z_{ij} \Big],
              \qquad z_{ij} = t\, x_i \cdot y_j

    where P are the positives of a row or a column. One without any contributes nothing, and M and N count the others.

    Args:
        x: [M, D] features (images), float32, bfloat16, float16 or float64, any strides. Normalise them first; the
            function does not.
        y: [N, D] features (texts), of the dtype and device of ``x``.
        scale: t >= 0, already exponentiated, a float or a floating tensor of one element; gradients flow to tensors.
            CLIP learns ln t from ln(1 / 0.07) and clamps it at ln 100, which is left to the caller.
        x_ids, y_ids: int64 [M] and [N], both or neither. Pairs with equal ids are positive (``same_id="positive"``),
            such as several captions of an image, or left out of every sum (``same_id="ignore"``): false negatives.
        offset: pair (i, i + offset) is always positive, whatever the ids say; out of range it is no pair.
        label_smoothing: share of each target that is spread evenly over all pairs that count, as in
            :func:`torch.nn.functional.cross_entropy`.
        reduction: "mean" as above; "sum" divides neither sum by its count; "none", for M = N and offset 0, gives row
            and column i together, [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 without any positive pair.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Under autocast, ``x`` and ``y`` are cast as for a matrix product; the loss is still accumulated in float32.
    float32 products follow ``torch.get_float32_matmul_precision()``. Between forward and backward the sums of the
    gradients that are needed are kept, [M, D] and [N, D] in float32. A tile, and a panel of features, take at most
    ``SSL_KERNELS_WORKSPACE_MB`` (default 64) megabytes each; up to ``SSL_KERNELS_TILE_BUDGET_MB`` (default 64) more
    spare the second pass its products. See :func:`ssl_kernels.use_workspace`, :func:`ssl_kernels.use_tile_budget`.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
    arXiv:2103.00020.

    >>> import torch, ssl_kernels.functional as K
    >>> x = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2), dim=-1).requires_grad_()
    >>> loss = K.clip_loss(x, x.detach().flip(1), 10.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(x.grad.shape)
    (2.6756, (4, 2))
    """
    return clip.clip_loss(
        x, y, scale, x_ids=x_ids, y_ids=y_ids, same_id=same_id, offset=offset, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip


def nt_xent_loss(z0: Tensor, z1: Tensor, temperature: Tensor | float, *, reduction: str = "mean") -> Tensor:
    r"""NT-Xent loss of SimCLR over two views of a batch, in memory linear in it, with exact gradients.

    .. math:: L_i = \log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau) - z_i \cdot z_{p(i)} / \tau

    for the 2 N rows of z = [z0; z1], normalised here, where p(i) is the other view of i. Similarities are symmetric:
    each is computed once.

    Args:
        z0: [N, D] features of one view, float32, bfloat16, float16 or float64, any strides.
        z1: [N, D] features of the other, of the dtype and device of ``z0``.
        temperature: tau > 0, a float or a floating tensor of one element; gradients flow to tensors.
        reduction: "mean" or "sum" over all rows, or "none", [2 N].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 for no rows.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020, arXiv:2002.05709.

    >>> import torch, ssl_kernels.functional as K
    >>> z0 = torch.arange(8.0).reshape(4, 2).requires_grad_()
    >>> loss = K.nt_xent_loss(z0, z0.detach().flip(1), 0.5)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(z0.grad.shape)
    (2.2006, (4, 2))
    """
    return nt_xent.nt_xent_loss(z0, z1, temperature, reduction=reduction)


def sup_con_loss(
    z: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    reduction: str = "mean",
    return_unpaired: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Supervised contrastive loss: rows that share an id attract each other; in memory linear in the batch.

    .. math:: L_i = \log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau)
                    - \frac{1}{|P_i|} \sum_{p \in P_i} z_i \cdot z_p / \tau

    where P are the other rows with the id of row i: the paper's L_out. Rows without any contribute nothing, and the
    mean is over the others.

    Args:
        z: [N, D] features, float32, bfloat16, float16 or float64, any strides. Normalise them first; the function
            does not.
        ids: int64 [N].
        temperature: tau > 0, a float or a floating tensor of one element; gradients flow to tensors.
        reduction: "mean", "sum", or "none", [N].
        return_unpaired: return also how many rows have no positive, a tensor that is not read here.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 without any positive pair. With
        ``return_unpaired``, the loss and the count.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Source: Khosla et al., Supervised Contrastive Learning, 2020, arXiv:2004.11362, equation 2.

    >>> import torch, ssl_kernels.functional as K
    >>> z = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2), dim=-1).requires_grad_()
    >>> loss, unpaired = K.sup_con_loss(z, torch.tensor([0, 1, 0, 2]), 0.5, return_unpaired=True)
    >>> loss.backward()
    >>> round(loss.item(), 4), unpaired.item(), tuple(z.grad.shape)
    (1.264, 2, (4, 2))
    """
    loss, unpaired = sup_con.sup_con_loss(z, ids, temperature, reduction=reduction)
    return (loss, unpaired) if return_unpaired else loss


def key_softmax(query: Tensor, keys: Tensor, scale: Tensor | float, *, want_mean: bool = True) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp and softmax-weighted mean of keys that receive no gradient, in one pass that keeps no similarities.

    .. math:: \mathrm{lse}_i = \log \sum_j \exp(t\, q_i \cdot k_j), \qquad
              \mathrm{mean}_i = \sum_j \operatorname{softmax}_j(t\, q_i \cdot k_j)\, k_j

    What losses over frozen keys are made of: the cross-entropy against targets :math:`w_{ij}` that sum to 1 is
    :math:`\mathrm{lse}_i - t\, q_i \cdot \sum_j w_{ij} k_j`, and over keys in several tensors
    ``torch.logaddexp(lse_a, lse_b)`` is the log-sum-exp.

    Args:
        query: [M, D] features, float32, bfloat16, float16 or float64, any strides.
        keys: [K, D] features without gradient, of any of these dtypes and any strides, read in place: for a queue that
            is stored as [D, K] pass ``queue.t()``. The CPU multiplies in float32 (float64 for a float64 query),
            a GPU in the dtype of ``query``, to which each key is cast as it is read.
        scale: t = 1 / temperature, a float or a floating tensor of one element; gradients flow to tensors.
        want_mean: whether the mean is needed. Without it, and without gradients, half of the work is left out.

    Returns:
        lse [M], differentiable in ``query`` and ``scale``, and mean [M, D], a constant to autograd; in float32 (float64
        for a float64 query). Without ``want_mean`` the mean is not to be relied on, and may have no rows. Over no keys
        lse is -inf and mean 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; ``keys`` that require a gradient
            are to be detached.
        RuntimeError: on double backward, which only the reference backend supports.

    Source: the running maximum and rescaling of Milakov and Gimelshein, Online normalizer calculation for softmax,
    2018, arXiv:1805.02867.

    >>> import torch, ssl_kernels.functional as K
    >>> lse, mean = K.key_softmax(torch.eye(2), torch.eye(2), 2.0)
    >>> [round(x, 4) for x in lse.tolist()], [round(x, 4) for x in mean[0].tolist()]
    ([2.1269, 2.1269], [0.8808, 0.1192])
    """
    return _key_softmax.key_softmax(query, keys, scale, want_mean=want_mean)


def info_nce_loss(
    query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    r"""InfoNCE loss of MoCo: one positive for each query, and negatives without gradient that all queries share.

    .. math:: L_i = -\log \frac{\exp(t\, q_i \cdot p_i)}{\exp(t\, q_i \cdot p_i) + \sum_j \exp(t\, q_i \cdot k_j)}

    Args:
        query: [M, D] features, float32, bfloat16, float16 or float64, any strides. Normalise them first; the function
            does not.
        positive: [M, D] features, of the dtype and device of ``query``. They may require a gradient.
        negatives: [K, D] features without gradient, such as :attr:`ssl_kernels.KeyQueue.keys`, of any of these dtypes
            and any strides, read in place: for a queue that is stored as [D, K] pass ``queue.t()``.
        scale: t = 1 / temperature, a float or a floating tensor of one element; gradients flow to tensors.
        reduction: "mean" or "sum" over the rows, or "none", [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; ``negatives`` that require a
            gradient are to be detached.
        RuntimeError: on double backward, which only the reference backend supports.

    Under autocast, ``query`` and ``positive`` are cast as for a matrix product. Memory beside the arguments is a few
    times [M, D] in float32 and one tile of similarities; no copy of ``negatives`` is made and none is kept for
    backward, so that a queue may be updated before it. See also :func:`key_softmax`.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722.

    >>> import torch, ssl_kernels.functional as K
    >>> query = torch.eye(2, 4).requires_grad_()
    >>> loss = K.info_nce_loss(query, query.detach(), torch.eye(4)[2:], scale=1 / 0.2)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(query.grad.shape)
    (0.0134, (2, 4))
    """
    return info_nce.info_nce_loss(query, positive, negatives, scale, reduction=reduction)


def albef_contrastive_loss(
    image: Tensor,
    text: Tensor,
    image_momentum: Tensor,
    text_momentum: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    scale: Tensor | float,
    alpha: float = 0.4,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""Image-text contrastive loss of ALBEF: targets softened by the momentum features, keys from batch and queue.

    With the keys :math:`K_T` = [text_momentum; text_queue], from image to text

    .. math:: L_i = -\sum_j w_{ij} \log \operatorname{softmax}_j(t\, x_i \cdot k_j), \qquad
              w_{ij} = \alpha \operatorname{softmax}_j(t\, x'_i \cdot k_j) + (1 - \alpha)\, [j = i]

    where x' is the momentum feature of x; likewise from text to image. The loss is the mean of both directions.

    Args:
        image, text: [M, D] features of pairs, float32, bfloat16, float16 or float64, any strides. Normalise all
            features first; the function does not.
        image_momentum, text_momentum: [M, D] features of the momentum encoders, of the dtype and device of ``image``,
            without gradient.
        image_queue, text_queue: [K, D] past momentum features without gradient, of any of these dtypes and any
            strides, read in place: for a queue that is stored as [D, K] pass ``queue.t()``.
        scale: t = 1 / temperature, a float or a floating tensor of one element. Gradients flow to tensors, but not
            through the targets.
        alpha: weight of the soft targets, from 0 to 1.
        reduction: "mean" or "sum" over the pairs, or "none", [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; momentum features and queues that
            require a gradient are to be detached.
        RuntimeError: on double backward, which only the reference backend supports.

    Under autocast, the features of the batch are cast as for a matrix product. Memory beside the arguments is a few
    times [M, D] in float32 and one tile of similarities. Enqueue the momentum features after the loss.

    Source: Li et al., Align before Fuse, 2021, arXiv:2107.07651.

    >>> import torch, ssl_kernels.functional as K
    >>> image, text, queue = torch.eye(3, 5).requires_grad_(), torch.eye(3, 5), torch.eye(5)[3:]
    >>> loss = K.albef_contrastive_loss(image, text, image.detach(), text, queue, queue, scale=5.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(image.grad.shape)
    (0.0791, (3, 5))
    """
    return albef.albef_contrastive_loss(
        image, text, image_momentum, text_momentum, image_queue, text_queue, scale, alpha, reduction=reduction
    )


@overload
def dino_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temp: Tensor | float = 0.1,
    teacher_temp: Tensor | float = 0.04,
    center: Tensor | None = None,
    pairs: str = "distinct",
    teacher_probs: bool = False,
    reduction: str = "mean",
    want_teacher_sum: Literal[False] = False,
) -> Tensor: ...
@overload
def dino_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temp: Tensor | float = 0.1,
    teacher_temp: Tensor | float = 0.04,
    center: Tensor | None = None,
    pairs: str = "distinct",
    teacher_probs: bool = False,
    reduction: str = "mean",
    want_teacher_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def dino_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temp: Tensor | float = 0.1,
    teacher_temp: Tensor | float = 0.04,
    center: Tensor | None = None,
    pairs: str = "distinct",
    teacher_probs: bool = False,
    reduction: str = "mean",
    want_teacher_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Self-distillation of DINO: cross-entropy of the student's crops under the teacher's, over all pairs of crops.

    .. math:: L_b = \frac{1}{P} \sum_{(t, v)} -\sum_k p_{tbk} \log \operatorname{softmax}_k(S_{vb} / \tau_s), \qquad
              p_{tb} = \operatorname{softmax}((T_{tb} - c) / \tau_t)

    where P is the number of pairs (t, v). The teacher's crops are the first of the student's, in the same order.

    Args:
        student: logits of V crops, as one tensor [V, B, K] or a sequence of crops [B, K] and blocks of crops [n, B, K],
            float32, bfloat16, float16 or float64, any strides.
        teacher: logits of T crops likewise, without gradient, of any of these dtypes.
        student_temp, teacher_temp: :math:`\tau_s` and :math:`\tau_t`, positive floats or floating tensors of one
            element, which the host does not read on a GPU; no gradient flows to them.
        center: c, K floating elements in any shape; None is zero. That of :func:`sinkhorn_center` makes the p those of
            Sinkhorn-Knopp.
        pairs: "distinct" leaves out pairs of the same crop, t = v; "all" does not.
        teacher_probs: ``teacher`` holds probabilities p instead of logits, and there is no centre.
        reduction: "mean" or "sum" over the samples, or "none", [B].
        want_teacher_sum: also return the sum of the teacher's logits over t and b, [K], from the same pass: divided by
            T B it is what c moves towards, as by :class:`ssl_kernels.DINOLoss`.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 logits), or a pair with the sum. The mean
        over no samples is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; a teacher or a centre that requires
            a gradient is to be detached.
        RuntimeError: on double backward, which only the reference backend supports.

    Each crop is visited once, however many pairs it is in. Probabilities are formed in float32 whatever the dtype of
    the logits, and never written; those below e^-64 may count as 0. The gradient is written in the forward pass, one
    exponential to an element, and handed over by the backward pass. Memory beside logits and gradient is a few rows of
    K elements to a thread.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.

    >>> import torch, ssl_kernels.functional as K
    >>> student = torch.eye(3, 4).repeat(4, 1, 1).requires_grad_()  # two global crops and two local ones
    >>> loss, teacher_sum = K.dino_loss(student, student[:2].detach(), center=torch.zeros(4), want_teacher_sum=True)
    >>> loss.backward()
    >>> round(loss.item(), 6), tuple(student.grad.shape), teacher_sum.tolist()
    (0.000136, (4, 3, 4), [2.0, 2.0, 2.0, 0.0])
    """
    return dino.dino_loss(
        student, teacher, student_temp=student_temp, teacher_temp=teacher_temp, center=center, pairs=pairs,
        teacher_probs=teacher_probs, reduction=reduction, want_teacher_sum=want_teacher_sum,
    )  # fmt: skip


@overload
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
    want_teacher_sum: Literal[False] = False,
) -> Tensor: ...
@overload
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
    want_teacher_sum: Literal[True],
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
    r"""Cross-entropy of masked patches under the teacher's view of them (iBOT), of the masked patches alone.

    .. math:: L = \sum_i w_i \Big( -\sum_k p_{ik} \log \operatorname{softmax}_k(S_i / \tau_s) \Big), \qquad
              p_i = \operatorname{softmax}((T_i - c) / \tau_t)

    Args:
        student, teacher: [N, K] logits of the N masked patches of a batch, as in :func:`dino_loss`.
        weights: [N] floating weights w without gradient; None is 1. The mean over B images of the mean over an image's
            masked patches has :math:`w_i = 1 / (B\, n)`, where n patches of its image are masked.
        student_temp, teacher_temp, center, teacher_probs, want_teacher_sum: as in :func:`dino_loss`.
        reduction: "sum" over the patches, or "none", [N].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 logits), or a pair with the sum of the
        teacher's logits. The sum over no patches is 0.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dino_loss`.

    Source: Zhou et al., iBOT, 2021, arXiv:2111.07832; Oquab et al., DINOv2, 2023, arXiv:2304.07193.

    >>> import torch, ssl_kernels.functional as K
    >>> logits = torch.eye(3, 4)
    >>> round(K.ibot_patch_loss(logits, logits, weights=torch.full((3,), 1 / 3)).item(), 6)
    0.000136
    """
    return ibot.ibot_patch_loss(
        student, teacher, weights, student_temp=student_temp, teacher_temp=teacher_temp, center=center,
        teacher_probs=teacher_probs, reduction=reduction, want_teacher_sum=want_teacher_sum,
    )  # fmt: skip


def sinkhorn_center(
    teacher: Tensor,
    teacher_temp: Tensor | float,
    *,
    n_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The centre c with which softmax((T - c) / tau) is the Sinkhorn-Knopp assignment of samples to prototypes.

    .. math:: v_k = \log \sum_i \exp(T_{ik} / \tau - u_i), \qquad u_i = \log \sum_k \exp(T_{ik} / \tau - v_k),
              \qquad c = \tau v

    from u = 0, ``n_iterations`` times. Given to :func:`dino_loss` or :func:`ibot_patch_loss` it makes the teacher's
    probabilities those of DINOv2, which are never written.

    Args:
        teacher: [..., K] logits without gradient, one row to a sample, float32, bfloat16, float16 or float64.
        teacher_temp: :math:`\tau`, a positive float or a floating tensor of one element.
        n_iterations: how often columns and rows are scaled.
        group: processes whose samples are assigned together, by all-reduces of K elements; None is all processes where
            ``torch.distributed`` is initialised. Their numbers of samples may differ.

    Returns:
        [K], float32 (float64 for float64 logits), the same on all processes. Without samples it is 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Logits of any size are fine: nothing overflows and no column underflows. The logits are read ``n_iterations`` times
    on a CPU.

    Source: Cuturi, 2013, arXiv:1306.0895; Caron et al., SwAV, 2020, arXiv:2006.09882; Oquab et al., DINOv2, 2023,
    arXiv:2304.07193.

    >>> import torch, ssl_kernels.functional as K
    >>> teacher = torch.tensor([[4.0, 0.0], [3.0, 0.0]])  # both prefer the first prototype
    >>> center = K.sinkhorn_center(teacher, teacher_temp=1.0)
    >>> [[round(p, 2) for p in row] for row in K.centered_softmax(teacher, 1.0, center).tolist()]
    [[0.62, 0.38], [0.38, 0.62]]
    """
    return sinkhorn.sinkhorn_center(teacher, teacher_temp, n_iterations=n_iterations, group=group)


def sinkhorn_knopp(
    teacher: Tensor,
    teacher_temp: Tensor | float,
    *,
    n_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The Sinkhorn-Knopp assignment itself, [..., K] probabilities in float32: rows sum to 1, columns nearly to N / K.

    It is ``centered_softmax(teacher, teacher_temp, sinkhorn_center(...))``; arguments and errors are those of
    :func:`sinkhorn_center`. A loss needs the centre only.

    >>> import torch, ssl_kernels.functional as K
    >>> q = K.sinkhorn_knopp(torch.randn(8, 4), teacher_temp=0.04)
    >>> torch.allclose(q.sum(1), torch.ones(8))
    True
    """
    return sinkhorn.sinkhorn_knopp(teacher, teacher_temp, n_iterations=n_iterations, group=group)


def centered_softmax(teacher: Tensor, teacher_temp: Tensor | float, center: Tensor | None = None) -> Tensor:
    r"""Probabilities :math:`\operatorname{softmax}_k((T - c) / \tau)` in float32, for code that wants to hold them.

    Args:
        teacher: [..., K] logits without gradient, float32, bfloat16, float16 or float64, any strides.
        teacher_temp: :math:`\tau`, a positive float or a floating tensor of one element.
        center: c, K floating elements in any shape; None is zero.

    Returns:
        The shape of ``teacher`` in float32 (float64 for float64 logits).

    >>> import torch, ssl_kernels.functional as K
    >>> [round(p, 2) for p in K.centered_softmax(torch.tensor([[1.0, 2.0]]), 1.0, torch.tensor([0.0, 1.0]))[0].tolist()]
    [0.5, 0.5]
    """
    return sinkhorn.centered_softmax(teacher, teacher_temp, center)


def koleo_loss(x: Tensor, *, eps: float = 1e-8, reduction: str = "mean") -> Tensor:
    r"""KoLeo: spreads the features of a batch by the distance of each to its nearest neighbour; in linear memory.

    .. math:: L_i = -\log(\lVert u_i - u_{n(i)} + \epsilon \rVert + \epsilon), \qquad
              u_i = \frac{x_i}{\max(\lVert x_i \rVert, \epsilon)}, \qquad n(i) = \arg\max_{j \ne i} u_i \cdot u_j

    The neighbour is the first of those with the largest product, and a constant of the gradient.

    Args:
        x: [B, D] features, at least 2 rows, float32, bfloat16, float16 or float64, any strides. They are normalised
            here.
        eps: :math:`\epsilon > 0`; it is added to every component of the difference, as by
            :class:`torch.nn.PairwiseDistance`.
        reduction: "mean" or "sum" over the rows, or "none", [B].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). That of two equal rows is finite,
        about 15 for 1,024 features, and so is its gradient, of the order of 1 / :math:`\epsilon`, which float16
        features cannot hold.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected. A single row has no neighbour.
        RuntimeError: on double backward, which only the reference backend supports.

    Autocast has no effect here: 16-bit features are compared as float32, whose products follow
    ``torch.get_float32_matmul_precision()``. Each pair is multiplied once. Nothing of B x B elements is kept: beside a
    few times [B, D] in float32, a tile of similarities takes at most ``SSL_KERNELS_WORKSPACE_MB`` megabytes.

    Source: Sablayrolles et al., Spreading Vectors for Similarity Search, 2018, arXiv:1806.03198; Oquab et al., DINOv2,
    2023, arXiv:2304.07193.

    >>> import torch, ssl_kernels.functional as K
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], requires_grad=True)
    >>> loss = K.koleo_loss(x)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(x.grad.shape)
    (-0.3466, (3, 2))
    """
    return koleo.koleo_loss(x, eps=eps, reduction=reduction)


def vicreg_loss(
    za: Tensor,
    zb: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    r"""VICReg: invariance between two views, variance and decorrelation of the features within each.

    .. math:: L = \frac{\lambda}{n D} \sum_{ij} (a_{ij} - b_{ij})^2
                + \frac{\mu}{2} [v(a) + v(b)] + \nu [c(a) + c(b)]

    .. math:: v(z) = \frac{1}{D} \sum_j \max\Big(0, 1 - \sqrt{C_{jj} + \epsilon}\Big), \qquad
              c(z) = \frac{1}{D} \sum_{j \ne k} C_{jk}^2, \qquad C = \operatorname{cov}(z) \text{ over } n - 1

    as in the authors' code and in lightly. The paper's sum of both v, also solo-learn's, is twice as much: there pass
    twice the weight.

    Args:
        za, zb: [n, D] features of two views, at least 2 rows, float32, bfloat16, float16 or float64, any strides.
        invariance_weight, variance_weight, covariance_weight: :math:`\lambda, \mu, \nu`.
        eps: :math:`\epsilon > 0`.

    Returns:
        The loss, computed and returned in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Where 2 n <= D, the squares are summed and differentiated through the n x n products of rows instead of C, which
    takes D / n times fewer operations; their rounding is then relative to the sum of all squared covariances, diagonal
    included. Of either matrix no more exists at a time than ``SSL_KERNELS_WORKSPACE_MB`` megabytes. The gradients are
    made in the forward pass and kept, [n, D] each in float32. Autocast has no effect here; float32 products follow
    ``torch.get_float32_matmul_precision()``.

    Source: Bardes et al., VICReg: Variance-Invariance-Covariance Regularization, 2021, arXiv:2105.04906.

    >>> import torch, ssl_kernels.functional as K
    >>> za = torch.arange(12.0).reshape(4, 3).sin().requires_grad_()
    >>> loss = K.vicreg_loss(za, za.detach().flip(0))
    >>> loss.backward()
    >>> round(loss.item(), 3), tuple(za.grad.shape)
    (57.449, (4, 3))
    """
    return vicreg.vicreg_loss(
        za, zb, invariance_weight=invariance_weight, variance_weight=variance_weight,
        covariance_weight=covariance_weight, eps=eps,
    )  # fmt: skip


def barlow_twins_loss(za: Tensor, zb: Tensor, *, lambda_param: float = 5e-3) -> Tensor:
    r"""Barlow Twins: the cross-correlation of two views' features is to be the identity.

    .. math:: L = \sum_j (C_{jj} - 1)^2 + \lambda \sum_{j \ne k} C_{jk}^2, \qquad
              C = \frac{1}{n} \sum_i a_i b_i^T

    where each feature of a and b has been brought to mean 0 and variance 1 over the batch, as by batch normalisation
    (1e-5 is added to the variance).

    Args:
        za, zb: [n, D] features of two views, as in :func:`vicreg_loss`.
        lambda_param: :math:`\lambda`.

    Returns:
        The loss, computed and returned in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Operations, memory and precision are as in :func:`vicreg_loss`.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, arXiv:2103.03230.

    >>> import torch, ssl_kernels.functional as K
    >>> za = torch.arange(12.0).reshape(4, 3).sin().requires_grad_()
    >>> loss = K.barlow_twins_loss(za, za.detach().flip(0))
    >>> loss.backward()
    >>> round(loss.item(), 3), tuple(za.grad.shape)
    (9.797, (4, 3))
    """
    return barlow_twins.barlow_twins_loss(za, zb, lambda_param=lambda_param)


def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    momentum: Tensor | float,
    copies: Iterable[Tensor | None] | None = None,
) -> None:
    r"""Exponential moving average of a list of tensors, in place: :math:`t \leftarrow m\,t + (1 - m)\,s` for each.

    All parameters of a model are one call and one pass over memory, whatever their sizes and dtypes, computed in
    float32 (float64 where one of a pair is float64). With m = 1 targets keep every bit; with m = 0 they take those of
    the sources, whatever they were.

    Args:
        targets: float32, bfloat16, float16 or float64 tensors of any shapes and strides, taken as constants by
            autograd. In 16 bits an average stands still once a step is less than its rounding: keep it in float32.
        sources: as many tensors of the same shapes, each of any of these dtypes. A source may be its own target, but
            share no memory with others.
        momentum: m in [0, 1], a float or a floating tensor of one element. A tensor on another device is not read by
            the host, nor checked, and there m = 0 and m = 1 are exact for finite numbers only.
        copies: as many tensors, or None for those without, that receive the new targets in their own dtype, such as
            bfloat16 weights for inference of averages in float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; also if a tensor is written twice.
        RuntimeError: if contiguous tensors overlap of which one is written; by the kernels in C++ and CUDA C++, which
            have everything but float64.

    All tensors are on one device, and only DTensors of one sharding are paired: each process updates its own part.
    Integer tensors are refused, for there is no average of counters; :class:`ssl_kernels.ModelEma` copies them.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722; Tarvainen & Valpola, Mean teachers, 2017,
    arXiv:1703.01780.

    >>> import torch, ssl_kernels.functional as K
    >>> teacher, student = torch.zeros(2), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    >>> copy = torch.empty(2, dtype=torch.float16)
    >>> K.ema_update_([teacher], [student], 0.75, [copy])
    >>> teacher.tolist(), copy.tolist()
    ([0.25, 0.5], [0.25, 0.5])
    """
    _ema.ema_update_(targets, sources, momentum, copies)


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = False) -> None:
    r"""Write keys over the oldest rows of a ring buffer, in place: row :math:`(\text{pointer} + r) \bmod K` for each r.

    Args:
        queue: [K, D], float32, bfloat16, float16 or float64, with rows that are contiguous in memory.
        pointer: int64 tensor of one element on the device of ``queue``: the row that the next key goes to. It moves on
            by B, modulo K, without synchronising the device with the host. On a GPU, it lies in [-2^52, 2^52).
        keys: [B, D] of any of these dtypes, any strides and any B; of more than K keys the last K remain. They are
            taken as constants, cast to the dtype of ``queue``.
        normalize: divide each key by its norm first, as ``torch.nn.functional.normalize`` does, in float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Enqueue strictly after the loss: keys that are in the queue before it are among their own negatives. A queue belongs
    to one CUDA stream at a time: on another, while a launch runs, the pointer may hold what its blocks count.

    >>> import torch, ssl_kernels.functional as K
    >>> queue, pointer = torch.zeros(4, 1), torch.tensor(3)
    >>> K.enqueue_(queue, pointer, torch.tensor([[5.0], [6.0]]))
    >>> queue.flatten().tolist(), pointer.item()
    ([6.0, 0.0, 0.0, 5.0], 1)
    """
    _queue.enqueue_(queue, pointer, keys, normalize=normalize)
