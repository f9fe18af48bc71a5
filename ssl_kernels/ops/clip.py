"""Symmetric softmax contrastive loss (CLIP): checks, reference, and the call of the engine."""

from __future__ import annotations

from torch import Tensor

from ssl_kernels.distributed import Group, across
from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import NO_DIAGONAL, Pairs
from ssl_kernels.ops.softmax import KERNELS, dense_losses, reduce_losses, softmax_contrastive
from ssl_kernels.ops.strips import gathered
from ssl_kernels.settings import choose_backend


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
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
) -> Tensor:
    r"""Symmetric softmax contrastive loss of CLIP, with exact gradients, in memory that is linear in the batch.

    .. math:: L = \frac{1}{2 M} \sum_i \Big[ \log \sum_j e^{z_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i} z_{ij} \Big]
                + \frac{1}{2 N} \sum_j \Big[ \log \sum_i e^{z_{ij}} - \frac{1}{|P_j|} \sum_{i \in P_j} z_{ij} \Big],
              \qquad z_{ij} = t\, x_i \cdot y_j

    where P are the positives of a row or a column. Rows and columns without a positive contribute nothing, and M and N
    do not count them.

    Args:
        x: [M, D] features, such as those of images, in float32, bfloat16, float16 or float64 and with any strides.
            Normalise them first; this function does not.
        y: [N, D] features, such as those of texts, of the same dtype and device as ``x``.
        scale: t >= 0, not its logarithm. A float, or a floating-point tensor of one element, which gets a gradient.
            CLIP learns ln t, starting from ln(1 / 0.07), and clamps it at ln 100; the clamp is left to the caller.
        x_ids, y_ids: int64 [M] and [N], both or neither. Pairs with equal ids, such as several captions of one image,
            are positive if ``same_id`` is "positive". If it is "ignore", they are left out of every sum as false
            negatives.
        offset: row i of ``x`` and row i + offset of ``y`` are a positive pair, whatever the ids say, if there are such
            rows.
        label_smoothing: share of each target that is spread evenly over all pairs that are not left out, as in
            :func:`torch.nn.functional.cross_entropy`.
        reduction: "mean" is the equation above; "sum" does not divide by M and N; "none" returns for each i the terms
            of row i and of column i together, [M], and needs M = N and offset 0.
        group, strategy, grad_reduce, even_batches, own_share: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 without any positive pair.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Under autocast, ``x`` and ``y`` are cast as for a matrix product; the loss is still accumulated in float32. float32
    products follow ``torch.get_float32_matmul_precision()``. Between forward and backward, the gradients that are
    needed are kept, [M, D] and [N, D] in float32. A tile of similarities and a panel of features take at most
    ``SSL_KERNELS_WORKSPACE_MB`` megabytes each, 64 by default. Up to ``SSL_KERNELS_TILE_BUDGET_MB`` megabytes more,
    also 64, hold similarities of the first pass, so that the second does not compute them again. See
    :func:`ssl_kernels.use_workspace` and :func:`ssl_kernels.use_tile_budget`.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
    arXiv:2103.00020.

    >>> import torch, ssl_kernels.functional as K
    >>> x = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2), dim=-1).requires_grad_()
    >>> loss = K.clip_loss(x, x.detach().flip(1), 10.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(x.grad.shape)
    (2.6756, (4, 2))
    """
    x, y = _checks.autocast_features(x, y)
    _checks.check_pairs(x, y, x_ids, y_ids, same_id, offset, reduction)
    _checks.check_fraction("label_smoothing", label_smoothing)
    if reduction == "none" and (x.shape[0] != y.shape[0] or offset != 0):
        raise ValueError(
            "reduction: 'none' pairs every row with its own column: expected as many rows in x as in y and offset 0, "
            f"got {x.shape[0]}, {y.shape[0]} and {offset}"
        )
    scale = _checks.as_softmax_scale("scale", scale, x)
    over = across(group, strategy, grad_reduce, even_batches, own_share, reduction)
    pairs = Pairs(x_ids, y_ids, same_id == "ignore", offset, NO_DIAGONAL)
    backend = choose_backend(x.device, x.dtype, KERNELS)
    if backend == "reference":
        (x, y), (scale,), pairs = gathered(
            over, (x, y), (scale,), pairs, what="clip_loss", reduction=reduction, label_smoothing=label_smoothing
        )
        return reference(x, y, scale, pairs, label_smoothing, reduction)
    return softmax_contrastive(
        x, y, scale, pairs, label_smoothing=label_smoothing, reduction=reduction, backend=backend, over=over,
        what="clip_loss",
    )[0]  # fmt: skip


def reference(x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, label_smoothing: float, reduction: str) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(x.dtype)
    with _checks.without_autocast(x):
        z = scale * (x.to(dtype) @ y.to(dtype).t())
        positive, ignored = pairs.masks(z.shape, z.device)
        rows, paired_rows = dense_losses(z, positive, ignored, label_smoothing)
        cols, paired_cols = dense_losses(z.t(), positive.t(), ignored.t(), label_smoothing)
        return (reduce_losses(rows, paired_rows, reduction) + reduce_losses(cols, paired_cols, reduction)) / 2
