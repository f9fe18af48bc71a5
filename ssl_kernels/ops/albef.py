r"""ALBEF's image-text contrastive loss: soft targets from momentum features, with queues of past ones.

The cross-entropy of a softmax over keys against targets w_ij is lse_i - t q_i . sum_j w_ij k_j. For the targets
alpha softmax(momentum) + (1 - alpha) one-hot that sum is the teacher's mean key, mixed with the paired key: two passes
of the softmax over frozen keys, the student's and the teacher's, and no target matrix.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.info_nce import check_same_rows, reduce_rows
from ssl_kernels.ops.key_softmax import KERNELS, check_keys, fused_key_softmax, widen
from ssl_kernels.settings import choose_backend


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
    r"""Image-text contrastive loss of ALBEF. Momentum features soften its targets; its keys are the batch and a queue.

    With the keys :math:`K_T` = [text_momentum; text_queue], from image to text

    .. math:: L_i = -\sum_j w_{ij} \log \operatorname{softmax}_j(t\, x_i \cdot k_j), \qquad
              w_{ij} = \alpha \operatorname{softmax}_j(t\, x'_i \cdot k_j) + (1 - \alpha)\, [j = i]

    where x' is the momentum feature of x; likewise from text to image. The loss is the mean of both directions.

    Args:
        image, text: [M, D] features of pairs, in float32, bfloat16, float16 or float64 and with any strides. Normalise
            all features first; this function does not.
        image_momentum, text_momentum: [M, D] features of the momentum encoders, of the same dtype and device as
            ``image``, without gradient.
        image_queue, text_queue: [K, D] past momentum features without gradient, of any of these dtypes and any strides.
            They are read in place: for a queue that is stored as [D, K] pass ``queue.t()``.
        scale: t = 1 / temperature. A float, or a floating-point tensor of one element, which gets a gradient, but not
            through the targets.
        alpha: weight of the soft targets, from 0 to 1.
        reduction: "mean" or "sum" over the pairs, or "none", [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
            Momentum features and queues that require a gradient do not fit: detach them.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Under autocast, the features of the batch are cast as for a matrix product. Besides its arguments the function needs
    a few times [M, D] in float32 and one tile of similarities. Write the momentum features into the queues after the
    loss, not before.

    Source: Li et al., Align before Fuse, 2021, arXiv:2107.07651.

    >>> import torch, ssl_kernels.functional as K
    >>> image, text, queue = torch.eye(3, 5).requires_grad_(), torch.eye(3, 5), torch.eye(5)[3:]
    >>> loss = K.albef_contrastive_loss(image, text, image.detach(), text, queue, queue, scale=5.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(image.grad.shape)
    (0.0791, (3, 5))
    """
    image, text, image_momentum, text_momentum = _checks.autocast_features(image, text, image_momentum, text_momentum)
    _checks.check_features(image=image, text=text, image_momentum=image_momentum, text_momentum=text_momentum)
    check_same_rows(image, text=text, image_momentum=image_momentum, text_momentum=text_momentum)
    check_keys(
        image,
        image_momentum=image_momentum,
        text_momentum=text_momentum,
        image_queue=image_queue,
        text_queue=text_queue,
    )
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    _checks.check_fraction("alpha", alpha)
    scale = _checks.as_scalar("scale", scale, image)
    backend = choose_backend(image.device, image.dtype, KERNELS)
    rows = reference if backend == "reference" else functools.partial(_one_direction, backend=backend)
    image_to_text = rows(image, image_momentum, text_momentum, text_queue, scale, alpha)
    text_to_image = rows(text, text_momentum, image_momentum, image_queue, scale, alpha)
    return reduce_rows((image_to_text + text_to_image) / 2, reduction)


def reference(
    query: Tensor, query_momentum: Tensor, keys: Tensor, queue: Tensor, scale: Tensor, alpha: float
) -> Tensor:
    """The definition, of each row in one direction: dense, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(query.dtype)
    with _checks.without_autocast(query):
        keys = torch.cat([keys.to(dtype), queue.to(dtype)])
        z = scale * (query.to(dtype) @ keys.t())
        teacher = scale.detach() * (query_momentum.to(dtype) @ keys.t())
        target = alpha * teacher.softmax(1) + (1 - alpha) * torch.eye(*z.shape, dtype=dtype, device=z.device)
        return F.cross_entropy(z, target, reduction="none")


def _one_direction(
    query: Tensor, query_momentum: Tensor, keys: Tensor, queue: Tensor, scale: Tensor, alpha: float, backend: str
) -> Tensor:
    """As ``reference``; the batch's keys and the queue stay two tensors, whose softmaxes are merged."""
    dtype, query = query.dtype, widen(query)
    lse_keys, _ = fused_key_softmax(query, keys, scale, dtype, backend, want_mean=False)
    lse_queue, _ = fused_key_softmax(query, queue, scale, dtype, backend, want_mean=False)
    target = widen(keys)
    if alpha:
        with torch.no_grad():
            teacher = widen(query_momentum)
            of_keys, mean_key = fused_key_softmax(teacher, keys, scale, dtype, backend, want_mean=True)
            of_queue, mean_queue = fused_key_softmax(teacher, queue, scale, dtype, backend, want_mean=True)
            share_of_queue = torch.sigmoid(of_queue - of_keys)
            target = torch.lerp(target, torch.lerp(mean_key, mean_queue, share_of_queue[:, None]), alpha)
    return torch.logaddexp(lse_keys, lse_queue) - scale * (query * target).sum(1)
