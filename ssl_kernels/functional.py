"""The fused operations as functions. ``import ssl_kernels.functional as K``."""

from __future__ import annotations

from torch import Tensor

from ssl_kernels.ops import albef, clip, info_nce, nt_xent, sigmoid, sup_con
from ssl_kernels.ops import key_softmax as _key_softmax
from ssl_kernels.ops import queue as _queue

__all__ = [
    "albef_contrastive_loss",
    "clip_loss",
    "enqueue_",
    "info_nce_loss",
    "key_softmax",
    "nt_xent_loss",
    "sigmoid_contrastive_loss",
    "sup_con_loss",
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


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = False) -> None:
    r"""Write keys over the oldest rows of a ring buffer, in place: row :math:`(\text{pointer} + r) \bmod K` for each r.

    Args:
        queue: [K, D], float32, bfloat16, float16 or float64, with rows that are contiguous in memory.
        pointer: int64 tensor of one element on the device of ``queue``: the row that the next key goes to. It moves on
            by B, modulo K, without synchronising the device with the host.
        keys: [B, D] of any of these dtypes, any strides and any B; of more than K keys the last K remain. They are
            taken as constants, cast to the dtype of ``queue``.
        normalize: divide each key by its norm first, as ``torch.nn.functional.normalize`` does, in float32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.

    Enqueue strictly after the loss: keys that are in the queue before it are among their own negatives.

    >>> import torch, ssl_kernels.functional as K
    >>> queue, pointer = torch.zeros(4, 1), torch.tensor(3)
    >>> K.enqueue_(queue, pointer, torch.tensor([[5.0], [6.0]]))
    >>> queue.flatten().tolist(), pointer.item()
    ([6.0, 0.0, 0.0, 5.0], 1)
    """
    _queue.enqueue_(queue, pointer, keys, normalize=normalize)
