r"""InfoNCE with one positive and many frozen negatives to a query (MoCo), on top of the softmax over frozen keys.

With lse_i over the negatives and z+_i = t q_i . p_i, -log softmax of the positive among all is softplus(lse_i - z+_i):
no sum of the positive with the negatives, from which a confident positive would have to be taken back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.key_softmax import check_keys, fused_key_softmax, widen
from ssl_kernels.settings import choose_backend


def info_nce_loss(
    query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    """Documented at :func:`ssl_kernels.functional.info_nce_loss`."""
    query, positive = _checks.autocast_features(query, positive)
    _checks.check_features(query=query, positive=positive)
    check_same_rows(query, positive=positive)
    check_keys(query, negatives=negatives)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    scale = _checks.as_scalar("scale", scale, query)
    backend = choose_backend(query.device.type, query.dtype)
    if backend == "reference":
        return reference(query, positive, negatives, scale, reduction)
    wide = widen(query)
    lse, _ = fused_key_softmax(wide, negatives, scale, query.dtype, backend, want_mean=False)
    z = scale * (wide * widen(positive)).sum(1)
    # An infinite similarity would pass for a perfect match, but for the second term.
    return reduce_rows(-F.logsigmoid(z - lse) + 0 * z, reduction)


def reference(query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor, reduction: str) -> Tensor:
    """The definition: cross-entropy of the positive among 1 + K, dense, in fp32 or float64."""
    with _checks.without_autocast(query):
        query, positive = widen(query), widen(positive)
        negatives = negatives.to(query.dtype, copy=True)  # a queue may change before the backward pass
        similarities = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.t()], 1)
        target = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        return F.cross_entropy(scale * similarities, target, reduction=reduction)


def check_same_rows(query: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: expected {query.shape[0]} rows, one to a query, got {other.shape[0]}")


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()
