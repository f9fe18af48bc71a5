"""The fused operations as functions. ``import ssl_kernels.functional as K``."""

from __future__ import annotations

from torch import Tensor

from ssl_kernels.ops import sigmoid

__all__ = ["sigmoid_contrastive_loss"]


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
